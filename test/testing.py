"""What test_tools.py and test_convert.py have in common: tools are run in this process, as importing torch anew takes
seconds, and the tests of a file one after the other, each in a folder of its own."""
import contextlib
import importlib
import io
import os
import sys
import tempfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))


class Skip(Exception):
    pass


def call(tool, *args):
    """Exit status, standard output and standard error of a tool."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [tool, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            importlib.import_module(tool[:-3]).main()
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = argv
    return status, out.getvalue(), err.getvalue()


def run(tool, *args):
    """Standard output and standard error of a tool that must succeed."""
    status, out, err = call(tool, *args)
    assert not status, f"exit {status}: {err.strip()}"
    return out, err


def fails(words, tool, *args):
    """A tool that must fail: exit 1, one line on standard error with these words in it, no file left or changed."""
    def files():
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in Path().rglob("*") if path.is_file()}

    before = files()
    status, _, err = call(tool, *args)
    said = f"{tool} {' '.join(map(str, args))}: exit {status}, said {err.strip()[-400:]!r}"
    assert status == 1, said
    assert err.count("\n") == 1 and words in err, f"{said}; want one line with {words!r}"
    assert files() == before, f"{said}; left a file behind, or changed one"


def fails_on_full_disk(path, tool, *args):
    """A tool that is to write `path` and finds the disk full: one line, and what was there stays."""
    Path(path).write_text("old")
    os.symlink("/dev/full", f"{path}.tmp")
    fails("No space left", tool, *args)
    assert Path(path).read_text() == "old" and not os.path.lexists(f"{path}.tmp"), f"{tool}: {path}"


def main(tests):
    """Runs the functions of `tests`, a module's globals(), whose names begin with test_ and hold what the command line
    says; ends with a line `N passed, N failed` and its exit status. What a test returns is its worst error."""
    chosen = sys.argv[1] if len(sys.argv) > 1 else ""
    passed, failed, skipped = 0, 0, 0
    home = os.getcwd()
    for name, test in list(tests.items()):
        if not name.startswith("test_") or chosen not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                worst = test()
                passed += 1
                print(f"{name[5:]:24} " + (f"worst relative error {worst:.1e} " if worst else "") + "ok", flush=True)
            except Skip as reason:
                skipped += 1
                print(f"{name[5:]:24} skipped: {reason}", flush=True)
            except Exception as error:
                failed += 1
                print(f"{name[5:]:24} FAIL: {type(error).__name__}: {error}", flush=True)
            finally:
                os.chdir(home)
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    sys.exit(1 if failed or not passed + skipped else 0)
