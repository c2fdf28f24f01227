"""`python -m hybrid_lightning`."""

from hybrid_lightning.cli import main

if __name__ == "__main__":
    main()
