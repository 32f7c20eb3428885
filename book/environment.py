"""Make the virtual environment that `make` works in, or leave it as it is when nothing changed.

    python3 book/environment.py --extras book [--venv .venv] [--torch 2.11.0]

Standard library only, and readable by an old Python: this file runs before anything is installed, and its
first duty is a clear message when it cannot go on. Nothing is upgraded behind the user's back: an
environment whose stamp (pyproject.toml, constraints.txt, torch, Python) is unchanged is not touched.
"""

from __future__ import print_function

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NEWEST_FIRST = ("python3.13", "python3.12", "python3.11")


def fail(message):
    print("difr3ct: " + message, file=sys.stderr)
    sys.exit(1)


def require_python():
    """Go on under a Python of at least 3.11, starting this script again if another one is on the PATH."""
    if sys.version_info >= (3, 11):
        return
    for name in NEWEST_FIRST:
        other = shutil.which(name) if hasattr(shutil, "which") else None
        if other:
            os.execv(other, [other, *sys.argv])
    fail(
        "this is Python %d.%d, and 3.11 or newer is needed. Install one and run `make PYTHON=/path/to/python3.11 ...`."
        % sys.version_info[:2]
    )


def constraints_text(torch_version):
    """constraints.txt with torch's line replaced; the packages that follow torch's version are its own business."""
    with open(os.path.join(ROOT, "constraints.txt")) as handle:
        text = handle.read()
    return re.sub(r"(?m)^torch==.*$", "torch==" + torch_version, text) if torch_version else text


def stamp_of(constraints):
    """What the installation depends on, as one string."""
    digest = hashlib.sha256(constraints.encode())
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as handle:
        digest.update(handle.read())
    digest.update(repr((ROOT, sys.version_info[:2])).encode())
    return digest.hexdigest()


def make_venv(venv):
    """Create the environment, or say what the system lacks."""
    if os.path.exists(os.path.join(venv, "bin", "pip")):
        return
    fresh = not os.path.exists(venv)
    print("Making %s with Python %d.%d" % (os.path.relpath(venv), sys.version_info[0], sys.version_info[1]), flush=True)
    run = subprocess.run([sys.executable, "-m", "venv", venv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if run.returncode:
        if fresh:  # never remove a folder that was there before
            shutil.rmtree(venv, ignore_errors=True)
        fail(
            "python -m venv failed; on Debian and Ubuntu install it with `apt-get install python3-venv` "
            "and run make again. It said:\n%s" % run.stdout.decode(errors="replace").strip()
        )


def pip_install(venv, arguments, display):
    """Run pip; the display shows what it is at, the log keeps every line."""
    log_path = os.path.join(venv, "install.log")
    command = [os.path.join(venv, "bin", "python"), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    command.append("--no-compile")  # Python compiles what is imported, which is a small part of what is installed
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONUNBUFFERED="1")
    lines = []
    with open(log_path, "w") as log:
        process = subprocess.Popen(
            command + arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            universal_newlines=True,
        )
        collected = 0
        for line in process.stdout:
            log.write(line)
            lines.append(line.rstrip())
            word = line.split()
            if line.startswith("Collecting"):
                collected += 1
                display.note("package %d, %s" % (collected, word[1]))
            elif line.startswith("Installing collected packages"):
                display.note("unpacking %d packages" % (line.count(",") + 1))
        code = process.wait()
    if code:
        display.close()
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-15:]
        fail("the installation failed; the whole log is in %s. pip said:\n%s" % (log_path, "\n".join(errors)))


def main():
    require_python()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extras", required=True, help="comma-separated extras of pyproject.toml")
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"))
    parser.add_argument("--torch", default="", help="another version of torch than constraints.txt names")
    options = parser.parse_args()
    wanted = set(filter(None, options.extras.split(",")))
    if "book" in wanted and not shutil.which("npm"):
        wanted.add("node")  # npm brings the scripts of the book's pages
    constraints = constraints_text(options.torch)
    stamp, stamp_path = stamp_of(constraints), os.path.join(options.venv, "difr3ct.json")
    installed = set()
    try:
        with open(stamp_path) as handle:
            record = json.load(handle)
        if record["stamp"] == stamp:
            installed = set(record["extras"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if wanted <= installed and os.path.exists(os.path.join(options.venv, "bin", "python")):
        return
    make_venv(options.venv)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from display import Display

    extras = sorted(wanted | installed)
    constraints_path = os.path.join(options.venv, "constraints.txt")
    with open(constraints_path, "w") as handle:
        handle.write(constraints)
    display = Display([("install " + ", ".join(extras), 150.0)])
    display.start("install " + ", ".join(extras))
    pip_install(options.venv, ["--constraint", constraints_path, "--editable", ".[%s]" % ",".join(extras)], display)
    display.finish()
    display.close()
    temporary = stamp_path + ".tmp"
    with open(temporary, "w") as handle:
        json.dump({"stamp": stamp, "extras": extras}, handle)
    os.replace(temporary, stamp_path)


if __name__ == "__main__":
    main()
