"""A progress bar, where one is asked for."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_of(op: str, total: int, show: bool, done: int = 0) -> Iterator[Callable[[], None]]:
    """Yields what says that one more of `total` evaluations is through.

    Raises:
        ImportError: a bar is asked for, and there is no tqdm.
    """
    if not show:
        yield lambda: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        hint = "pip install 'flatkern[plot]'"
        raise ImportError(f"{op}: progress=True needs tqdm ({hint})") from error
    with tqdm(total=total, initial=done, desc=op, unit="loss") as bar:
        yield lambda: bar.update()
