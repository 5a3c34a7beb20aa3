"""The questions of the demo: a few conversations that show what the model can do."""

CONVERSATIONS: tuple[tuple[str, ...], ...] = (
    ("Hello! What can you do?",),
    ("Please bring me the red cup from the kitchen.", "Now put it back.", "Where is it?"),
    ("Take the book from the shelf and put it on the nightstand, then turn off the lamp and say good night.",),
    ("If the window in the bedroom is open, close it.",),
    ("Wait two minutes and then tell Anna that dinner is ready.",),
    ("Bring me the blue mug.", "No, the green one."),
    ("Can you fly to the moon?",),
)
