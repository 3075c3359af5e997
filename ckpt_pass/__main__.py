"""``python -m ckpt_pass``: the same as the command ``ckpt-pass``."""

from ckpt_pass.cli.commands import main

if __name__ == "__main__":
    main()
