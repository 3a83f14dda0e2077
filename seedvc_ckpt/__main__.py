"""``python -m seedvc_ckpt``."""

from seedvc_ckpt.cli import main

main()
