"""The package's commands and other programs, run without an interpreter of their own, which takes seconds to import torch."""

import contextlib
import io
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch.distributed as dist
from ranks import run


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it wrote."""

    code: int
    out: str
    err: str


def run_command(*arguments: object) -> Ended:
    """Run `commpress ARGUMENTS` here. An exception that is no end of the program is not caught."""
    from commpress.launch import cli

    return ended(lambda: cli.main([str(argument) for argument in arguments]))


def run_code(code: str, **environment: str) -> Ended:
    """Run code as `python -c` does, in a new process that has imported torch and nothing of ours."""
    return run(1, _interpreted, code, environment, bare=True)[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def started_by_torchrun(port: int) -> Iterator[None]:
    """Be in the environment that torchrun gives this rank, and in no group; a store listens on `port`."""
    place = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    place["LOCAL_WORLD_SIZE"] = dist.get_world_size()
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    with _no_group():
        before = dict(os.environ)
        os.environ.update({name: str(value) for name, value in {**place, **store}.items()})
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def _no_group() -> Iterator[None]:
    """Leave the group that `ranks.run` has made; there is another at the end, for it to leave."""
    dist.destroy_process_group()
    try:
        yield
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _interpreted(code: str, environment: dict[str, str]) -> Ended:
    found = [name for name in sys.modules if name.split(".")[0] == "commpress"]
    assert not found, found
    os.environ.update(environment)
    main = sys.modules["__main__"] = types.ModuleType("__main__")

    def interpreted() -> None:
        try:
            exec(compile(code, "<string>", "exec"), vars(main))
        except Exception:
            traceback.print_exc()
            sys.exit(1)

    with _no_group():
        return ended(interpreted)


def ended(action: Callable[[], object]) -> Ended:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            action()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
            if isinstance(end.code, str):  # the interpreter's own way to end
                print(end.code, file=sys.stderr)
    return Ended(code, *(stream.buffer.getvalue().decode() for stream in (out, err)))
