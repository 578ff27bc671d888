"""Flags that programs share, and one way to start them: errors in one line, never a traceback."""

import dataclasses
import difflib
import dis
import importlib.util
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from refine_af import configs, drafting, interruptions, memory
from refine_af.config import Experiment, Mesh
from refine_af.config_reading import from_dict
from refine_af.models import processes
from refine_af.models.one_line import one_line
from refine_af.models.sources import cache_dir
from refine_af.models.writing import WriteError

_CONFIGS = Path(next(iter(configs.__path__)))
_MOST_TEXT = 4000  # characters of an error
_MOST_REASON = 200  # characters of a library's reason within one
_LEVERS = {  # flags of programs that decide how much memory is taken
    "batch_size": "lower --batch_size",
    "max_new_tokens": "lower --max_new_tokens",
    "max_length": "lower --max_length",
    "int8_weights": "set --int8_weights",
}

MODEL_HELP = (
    "Hugging Face or Orbax directory, .gguf file, hub id, random:PRESET, or a bundled name."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0, the same for all processes of a run; not for TPU pods, Slurm and "
    "Open MPI, where they find each other.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def available_configs() -> list[str]:
    """Names that `--config` takes besides a path."""
    return sorted(p.stem for p in _CONFIGS.glob("*.py") if not p.stem.startswith("_"))


def load_config(name: str) -> Experiment:
    """Experiment of a bundled name or of a `.py` file; each value has the type of its field.

    Raises:
        ValueError: no such config, or the file fails or does not give an Experiment.
    """
    path = Path(name) if name.endswith(".py") else _CONFIGS / f"{name}.py"
    if not path.is_file():
        near = difflib.get_close_matches(name, available_configs(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"--config={name}: not found; expected a .py file or one of {available_configs()}{hint}"
        )
    spec = importlib.util.spec_from_file_location("experiment", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Experiment):
        raise ValueError(f"{path}: expected a function get_config() that returns an Experiment")
    return from_dict(Experiment, dataclasses.asdict(config))


def parse_with_config(argv: Sequence[str]) -> list[str]:
    """absl flags parser for programs with `--config` and typed `--config.a.b=value` overrides.

    Leaves the validated, frozen `Experiment` in `experiment()`.
    """
    known = flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=known)
    rest = [part for argument in known(list(argv), known_only=True) for part in _axes(argument)]
    name = known.config
    if name is None:
        flags.DEFINE_string("config", None, _CONFIG_HELP)
        _parse(rest)  # shows --help, or names an unknown flag
        raise ValueError(f"--config is required: one of {available_configs()} or a .py file")
    values = ConfigDict(dataclasses.asdict(load_config(name)))
    _check_fields(rest, values)
    config_flags.DEFINE_config_dict("config", values, _CONFIG_HELP, sys_argv=rest)
    left = _parse(rest)
    _PARSED.append(from_dict(Experiment, flags.FLAGS.config.to_dict()))
    return left


def _parse(argv: Sequence[str]) -> list[str]:
    """Parse all flags; `--help` shows those of the program and exits 0."""
    if _asks_for_help(argv):
        print((sys.modules["__main__"].__doc__ or "").strip())
        print(flags.FLAGS.main_module_help())
        print(flags.FLAGS.module_help(__name__))
        sys.exit(0)
    try:
        return flags.FLAGS(list(argv))
    except flags.IllegalFlagValueError as error:
        raise flags.IllegalFlagValueError(_with_kind(str(error))) from None


def _asks_for_help(argv: Sequence[str]) -> bool:
    return bool({"--help", "-help", "-h"} & set(argv[1:]))


_CONFIG_HELP = (
    f"Experiment: one of {', '.join(available_configs())}, or a path to a .py file with "
    "get_config(). Fields are overridden like --config.ppo.learning_rate=3e-6, the mesh also like "
    "--config.mesh=data:2,fsdp:-1."
)
_PARSED: list[Experiment] = []


def experiment() -> Experiment:
    """Config of this program, with its overrides."""
    return _PARSED[-1]


def _axes(argument: str) -> list[str]:
    """`--config.mesh=data:2,fsdp:4` as overrides of the fields; an axis that it lacks is 1.

    Raises:
        ValueError: it is not such a list.
    """
    match = re.fullmatch(r"--?config\.mesh=(.*)", argument)
    if match is None:
        return [argument]
    return [f"--config.mesh.{name}={size}" for name, size in _sizes(match[1], argument).items()]


def _sizes(text: str, argument: str) -> dict[str, int]:
    """Size of every axis of `data:2,fsdp:4`."""
    names = [field.name for field in dataclasses.fields(Mesh)]
    pairs = [item.partition(":")[::2] for item in text.split(",")]
    sizes = dict(pairs)
    if len(sizes) < len(pairs) or not all(
        axis in names and re.fullmatch(r"-?\d+", size) for axis, size in pairs
    ):
        raise ValueError(f"{argument}: expected AXIS:SIZE of {names}, as in data:2,fsdp:-1")
    return {name: int(sizes.get(name, 1)) for name in names}


def dtype_flag(default: str) -> "flags.FlagHolder[str]":
    """`--dtype`, for programs without a config."""
    text = "Number type of weights and arithmetic."
    return flags.DEFINE_enum("dtype", default, ["float32", "bfloat16"], text)


def format_flag() -> "flags.FlagHolder[str]":
    """`--format` of prompts."""
    text = "Prompts as they are (raw) or as a user's turn (chat)."
    return flags.DEFINE_enum("format", "raw", ["raw", "chat"], text)


def draft_tokens_flag() -> "flags.FlagHolder[int]":
    """`--draft_tokens`, for programs without a config."""
    text = (
        "Tokens that are guessed from the text so far and read along with each: the same answers, "
        "sooner where texts repeat themselves and the batch is small; 0: none."
    )
    return flags.DEFINE_integer("draft_tokens", 0, text, 0, drafting.MOST)


def mesh_flag() -> "flags.FlagHolder[str]":
    """`--mesh`, for programs without a config."""
    text = "Devices by axis, such as data:2,fsdp:-1 (-1: the rest); default: all for fsdp."
    return flags.DEFINE_string("mesh", "", text)


def mesh_of(holder: "flags.FlagHolder[str]") -> Mesh:
    """The mesh that `--mesh` asks for.

    Raises:
        ValueError: it is no list of axes and sizes.
    """
    return Mesh(**_sizes(holder.value, f"--mesh={holder.value}")) if holder.value else Mesh()


def _check_fields(argv: Sequence[str], values: ConfigDict) -> None:
    """Name the nearest fields to one that does not exist."""
    fields = _paths(values.to_dict())
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        path = match[1] if match else None
        if path is None or path in fields:
            continue
        near = difflib.get_close_matches(path, fields, n=3, cutoff=0.5)
        near = near or [f for f in fields if f.rsplit(".")[-1] == path.rsplit(".")[-1]]
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"--config.{path}: no such field{hint}")


def _with_kind(error: str) -> str:
    """A refused flag as it was given, and what it expects instead of Python's reason."""
    kinds = {
        "invalid literal": "a whole number",
        "could not convert": "a number",
        "('Non-boolean": "true or false",
    }
    match = re.match(rf"flag (--.*): ({'|'.join(map(re.escape, kinds))})", error, re.DOTALL)
    return f"{match[1]}: expected {kinds[match[2]]}" if match else error


def _paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _paths(value, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def workdir_flags() -> tuple[flags.FlagHolder[str | None], flags.FlagHolder[bool]]:
    """`--workdir` and `--force_config`."""
    workdir = flags.DEFINE_string(
        "workdir", None, "Directory of the run's files; made when missing."
    )
    force = flags.DEFINE_bool(
        "force_config", False, "Go on in a workdir that was made with another config."
    )
    return workdir, force


def require(holder: flags.FlagHolder[str | None]) -> str:
    """Value of a flag that must be given.

    Raises:
        ValueError: it is not.
    """
    if not holder.value:
        raise ValueError(f"--{holder.name} is required; see --help")
    return holder.value


def exclude(unused: "Sequence[flags.FlagHolder[Any]]", other: str, why: str) -> None:
    """Raise ValueError where a flag is given that `other` has no use for."""
    given = [flag.name for flag in unused if flag.present]
    if given:
        raise ValueError(f"--{given[0]} and {other} exclude each other: {why}")


def start(
    main: Callable[[], None],
    *,
    with_config: bool = False,
    resumes: bool = True,
    one_process: bool = False,
) -> None:
    """Run a program: parse flags, set up JAX, call `main`, turn faults into one line.

    Args:
        resumes: whether the same command goes on where it was stopped.
        one_process: of several processes the writer works alone.

    Exit status: 0 done, or stopped by SIGTERM where the same command goes on; 2 bad input, or a
    file that cannot be read or written; 130 Ctrl-C; 143 SIGTERM elsewhere. Of several processes
    the one that fails ends all, with its reason and status.
    """
    parse = parse_with_config if with_config else _parse
    interruptions.install()
    try:
        _set_up_jax()
        _meet(sys.argv)  # before anything that may fail on one host, so that all are told
        left = parse(sys.argv)
        if len(left) > 1:
            raise ValueError(f"unexpected argument {left[1]!r}; flags look like --name=value")
        logging.use_absl_handler()
        logging.set_verbosity(logging.WARNING if processes.is_writer() else logging.ERROR)
        logging.get_absl_logger().addFilter(_is_news)
        getLogger("asyncio").addFilter(_is_no_echo)
        sys.unraisablehook = _report_leftover
        processes.once(main) if one_process else main()
    except KeyboardInterrupt as error:
        agreed = isinstance(error, interruptions.AgreedInterrupt)
        _stopped(resumes, str(error), agreed=agreed)
    except SystemExit as error:
        if error.code and processes.several():
            processes.fail(f"exit status {error.code}", int(error.code))
        raise
    except Exception as error:
        if interruptions.received() and not isinstance(error, WriteError):
            _stopped(resumes)  # a library's way of saying so
        text = one_line(error, _MOST_TEXT)
        if memory.ran_out(error):
            text = f"out of memory ({one_line(error, _MOST_REASON)}): {_lighter()}"
        elif not isinstance(error, ValueError | OSError | flags.Error) or not _is_for_user(error):
            if processes.several():
                traceback.print_exc()
                if isinstance(error, jax.errors.JaxRuntimeError):
                    processes.await_news()
                processes.fail(f"{type(error).__name__}: {text}", 1)
            raise
        print(f"error: {text}", file=sys.stderr)
        _exit(text, 2)


def _lighter() -> str:
    """What to change where memory has run out; stages know better (`memory.advice`)."""
    levers = {name: lever for name, lever in _LEVERS.items() if name in flags.FLAGS}
    found = [f"{lever} (now {flags.FLAGS[name].value})" for name, lever in levers.items()]
    found += ["raise --config.mesh.fsdp"] if "config" in flags.FLAGS else []
    return ", ".join(found) or "use a device with more"


def _is_news(record: LogRecord) -> bool:
    """Orbax logs what it raises, with the tracebacks of its threads."""
    return not (record.exc_info and "orbax" in record.pathname)


def _is_no_echo(record: LogRecord) -> bool:
    """Of Orbax's writes that fail together one is raised; asyncio logs the others, with theirs."""
    return "exception was never retrieved" not in record.getMessage()


def _report_leftover(leftover: Any, report: Callable[[Any], None] = sys.unraisablehook) -> None:
    """Tell of an exception that nobody can catch, but for two kinds.

    Those are of Orbax's reads and writes beside one that failed, and of a signal that came while
    Python was in a library's callback: it takes effect at the next `interruptions.check`.
    """
    noise = ("Event loop is closed", "Encountered error while reading array")
    signalled = interruptions.received() and isinstance(leftover.exc_value, KeyboardInterrupt)
    if not signalled and not str(leftover.exc_value).startswith(noise):
        report(leftover)


def _stopped(resumes: bool, left_over: str = "", *, agreed: bool = False) -> NoReturn:
    """Leave; where all processes have `agreed` to, each does so by itself.

    Args:
        left_over: what there is, where that is not what `resumes` says.
    """
    usual = "the same command goes on from here" if resumes else "nothing was written"
    print(f"\nstopped; {left_over or usual}", file=sys.stderr)
    threading.excepthook = lambda _: None  # a save under way finds its workers gone
    code = 130
    if interruptions.received() == signal.SIGTERM:
        code = 0 if resumes else 143
    if agreed:
        sys.exit(code)
    _exit("stopped", code)


def _exit(reason: str, code: int) -> NoReturn:
    if processes.several():
        processes.fail(reason, code)
    sys.exit(code)


def _is_for_user(error: BaseException) -> bool:
    """Faults of input: flags, files, and ValueErrors that a `raise` of this project made.

    A ValueError out of a library or a builtin is a defect of ours, and keeps its traceback. (JAX
    takes its own frames out of tracebacks: that the last one is ours proves nothing.)
    """
    if isinstance(error, OSError | flags.Error):
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    assert last is not None
    package = last.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    instruction = dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]]
    return package in ("refine_af", "__main__") and instruction == "RAISE_VARARGS"


def _meet(argv: Sequence[str]) -> None:
    """Join the other processes of this run, if there are any; no other flag is looked at.

    Raises:
        ValueError: the flags are not complete, or the others were started with other arguments.
    """
    if _asks_for_help(argv):
        return
    known = flags.FlagValues()
    known.set_gnu_getopt(True)  # values of other flags may stand among them
    for holder in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID):
        known[holder.name] = flags.FLAGS[holder.name]
    known(list(argv), known_only=True)
    given = {name: known[name].value for name in known}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if not processes.launched_as_several():
            return
        processes.join()
    else:
        if missing:
            names = ", ".join(f"--{name}" for name in given)
            raise ValueError(f"--{missing[0]} is missing: give {names}, or none of them")
        _join(*given.values())
    first, *others = processes.everyone(_without_number(argv[1:]))
    for other, theirs in enumerate(others, start=1):
        if theirs != first:
            raise ValueError(
                f"process {other} was started with {shlex.join(theirs)!r}, and process 0 with "
                f"{shlex.join(first)!r}; all of a run take the same arguments"
            )
    if not processes.is_writer():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the program runs


def _without_number(argv: Sequence[str]) -> list[str]:
    """Arguments without `--process_id` and its value, which may follow it."""
    rest, kept = iter(argv), []
    for argument in rest:
        flag, equals, _ = argument.partition("=")
        if flag.lstrip("-") != _PROCESS_ID.name:
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return kept


def _join(address: Any, count: Any, number: Any) -> None:
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"--coordinator_address={address}: expected HOST:PORT")
    if not 0 <= number < count:
        raise ValueError(
            f"--process_id={number}: expected 0 to {count - 1} with --num_processes={count}"
        )
    processes.join(address, count, number)


def _set_up_jax() -> None:
    """Keep compiled programs between runs, unless the user has chosen a place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
