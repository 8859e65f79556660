"""Durations as progress lines show them."""


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: "30:00:05"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
