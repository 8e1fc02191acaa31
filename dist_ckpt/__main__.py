"""`python -m dist_ckpt`: the command line."""

from dist_ckpt.cli import main

if __name__ == "__main__":
    main()
