"""`plait`, and `python -m plait`."""

import gc


def main() -> None:
    """Run the command line and leave the process (`plait.cli.main`)."""
    gc.disable()  # nothing that is made on importing is garbage
    from plait.cli.variables import forget_impossible_widths

    forget_impossible_widths()  # before typer is imported, of which older releases read them then
    from plait.cli.main import main as run

    gc.freeze()
    gc.enable()
    run()


if __name__ == "__main__":
    main()
