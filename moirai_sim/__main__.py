"""``python -m moirai_sim``: the command line, where ``moirai-sim`` is not on the path."""

from moirai_sim.cli import main

if __name__ == "__main__":
    main()
