"""`python -m qlora_ext` prints what was built and what is live."""

from . import build_info


def main() -> None:
    for key, value in build_info().items():
        print(f"{key:>14}  {value}")


if __name__ == "__main__":
    main()
