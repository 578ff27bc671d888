"""What libraries raise, with their many lines, as one line for the user."""


def one_line(error: BaseException, most: int = 300) -> str:
    """Text of an error in a line of about `most` characters: a longer one loses its middle."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
