"""One file per verb of the Makefile: its contract, then one call into the library."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns on import wherever its optional 4-bit kernels lack
