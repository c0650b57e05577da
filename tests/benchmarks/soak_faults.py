"""Parts of `soak.py`: disks that are full or may not be written, and two processes that start the same pipeline.

Every command N finds `before-N`, `after-N` (the folder before and after it, undisturbed) and `seconds-N` beside the folder. Disks are
real: a tmpfs of 64 MiB, which only root may mount; without root those parts say that they were left out.
"""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

Command = tuple[list[object], str]  # and what it writes, seen from the folder
Start = Callable[..., "subprocess.Popen[str]"]
Contents = Callable[[Path], dict[str, bytes]]
# Root without the capabilities that pass over permissions: another user could not start an interpreter in root's home
BOUND = ["setpriv", *(f"--{which}=-dac_override,-dac_read_search" for which in ("bounding-set", "inh-caps"))]
LEFT_OUT = "left out: mounting a tmpfs needs root"


@contextmanager
def disk(folder: Path, content: Path) -> Iterator[None]:
    """A tmpfs of 64 MiB in place of the folder, with what `content` holds."""
    shutil.rmtree(folder)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=755", "tmpfs", str(folder)], check=True)
    try:
        shutil.copytree(content, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Takes all free space but `leave` bytes with one file."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - leave))
    return filler


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but locks, caches and what an interrupted stage may go on from."""
    apart = {".cache", ".locks"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part in apart or ".partial" in part for part in path.parts)
    }


def full(folder: Path, line: Sequence[Command], start: Start, same: Contents, rng: random.Random) -> str:
    """Every command twice: without room for what it writes, and with a disk that fills up while it works.

    Raises AssertionError naming the command.
    """
    if os.getuid() != 0:
        return LEFT_OUT
    refused = 0
    for number, (words, writes) in enumerate(line):
        before, after = (folder.with_name(f"{when}-{number}") for when in ("before", "after"))
        for late in (False, True):
            case = f"{words[0]} on a disk that {'filled up' if late else 'was full'}"
            with disk(folder, before):
                if late:
                    process = start(words)
                    time.sleep(rng.random() * float(folder.with_name(f"seconds-{number}").read_text()))
                    filler = fill(folder, 0)
                else:
                    filler = fill(folder, rng.randrange(8192))
                    process = start(words)
                _, err = process.communicate()
                filler.unlink()
                if process.returncode:
                    assert process.returncode == 1 and "Traceback" not in err and "free" in err, (case, err)
                    now = tree(folder)
                    assert all(now.get(name) == data for name, data in tree(before).items()), case
                    refused += 1
                again = start(words)
                _, err = again.communicate()
                assert again.returncode == 0, (case, err)
                assert same(folder / writes) == same(after / writes), case
    return f"{2 * len(line)} commands, {refused} stopped: exit 1, earlier files as they were, completed when there was room"


def unwritable(folder: Path, line: Sequence[Command], start: Start) -> str:
    """Every command on a disk mounted read-only, and one where permissions let it read but not write. Raises AssertionError."""
    if os.getuid() != 0:
        return LEFT_OUT
    for number, (words, _) in enumerate(line):
        with disk(folder, folder.with_name(f"before-{number}")):
            subprocess.run(["chmod", "-R", "a+rX,a-w", str(folder)], check=True)
            before = tree(folder)
            for bound, option in (((), "ro"), (BOUND, "rw")):
                subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)
                process = start(words, bound)
                _, err = process.communicate()
                case = (words[0], "no permission" if bound else "read-only", process.returncode, err)
                assert process.returncode == 1 and "cannot write" in err and "Traceback" not in err, case
                assert tree(folder) == before, case
    return f"{2 * len(line)} commands: exit 1, a message that names the path, nothing changed"


def users(folder: Path, line: Sequence[Command], start: Start, same: Contents) -> str:
    """Two processes start every command on one directory at the same time. Raises AssertionError.

    Each works, waits for the other or exits with 5, and the result is that of one.
    """
    whole, exits = folder.with_name(f"after-{len(line) - 1}"), {0: 0, 5: 0}
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("before-0"), folder)
    for words, _ in line:
        both = [start(words), start(words)]
        for process in both:
            _, err = process.communicate()
            assert process.returncode in exits, (words[0], process.returncode, err)
            exits[process.returncode] += 1
        assert any(process.returncode == 0 for process in both), words[0]
    for _, writes in line:
        assert same(folder / writes) == same(whole / writes), writes
    return f"{len(line)} commands twice at once: {exits[0]} worked or found it done, {exits[5]} refused (exit 5); one result"
