"""Find what fits a device and which variant to take: estimates, device profiles, selection and ``edgellm doctor``."""
