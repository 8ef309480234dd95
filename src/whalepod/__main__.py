"""`python -m whalepod`: the same as the command `whalepod`."""

from whalepod.cli import run

if __name__ == "__main__":
    run()
