"""int4 from a checkpoint whose values were chosen with sample texts: by AWQ (Lin et al. 2023, arXiv 2306.00978), GPTQ
or the like. A build takes the checkpoint's own quantized values."""

import dataclasses

from engine_core.formats.weight_formats import int4

FORMAT = dataclasses.replace(int4.FORMAT, name="int4_awq", needs_calibration=True)
