"""``python -m seedvc_train``."""

from seedvc_train.cli import main

main()
