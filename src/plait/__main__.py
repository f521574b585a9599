"""`plait`, and `python -m plait`."""

from plait.deferred import collect_from_torch_on


def main() -> None:
    """Run the command line and leave the process (`plait.cli.main`)."""
    collect_from_torch_on()  # before the command line is imported
    from plait.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
