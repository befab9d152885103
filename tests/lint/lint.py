#!/usr/bin/env python3
"""Checks on the sources that no compiler makes. Usage: lint.py text|format|tidy ROOT [BUILD]

Exits 0 when clean, 1 with a line per finding, 77 with the reason when the tool is not installed.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

SKIP = 77
CPP = (".h", ".cc", ".cu", ".cuh")
SOURCE = CPP + (".py", ".sh", ".cmake", ".txt")
BINARY = (".png", ".jpg", ".gif", ".h5", ".bin", ".idx", ".model", ".safetensors", ".gz", ".pdf")
MAX_LINES = 500
JUSTIFICATION = re.compile(r"past 500 lines", re.IGNORECASE)
JUSTIFIED_WITHIN = 20  # lines from the top

# Spelled in pieces, so that this file passes its own check.
MACHINE_PATH = re.compile("(?<![A-Za-z0-9_.])/(?:" + "|".join(("work/", "tmp/w" + "t", "home/[a-z]")) + ")")
UNFINISHED = re.compile(r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")


def Files(root):
    """Every file of the project: tracked, or new and not ignored."""
    try:
        listed = subprocess.run(
            ["git", "-C", root, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            check=True, capture_output=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        # An unpacked archive: everything but hidden folders and build trees.
        listed = []
        for folder, below, names in os.walk(root):
            below[:] = [b for b in below if not b.startswith((".", "build"))]
            listed += [os.path.relpath(os.path.join(folder, n), root) for n in names]
    return sorted({f for f in listed if f and os.path.isfile(os.path.join(root, f))})


def TextFindings(name, data):
    """Findings in one file's bytes, as `name:line: what`."""
    if b"\r" in data:
        yield f"{name}: carriage returns (lines must end with a newline alone)"
    if data and not data.endswith(b"\n"):
        yield f"{name}: no newline at the end"
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as e:
        yield f"{name}: not UTF-8 ({e.reason} at byte {e.start})"
        return
    for number, line in enumerate(lines, 1):
        if "\t" in line:
            yield f"{name}:{number}: a tab"
        if line.rstrip("\r") != line.rstrip("\r").rstrip():
            yield f"{name}:{number}: blanks at the end of the line"
        if MACHINE_PATH.search(line):
            yield f"{name}:{number}: a path of one machine: {line.strip()}"
        if UNFINISHED.search(line):
            yield f"{name}:{number}: unfinished: {line.strip()}"
    count = len(lines) - 1
    if (name.endswith(SOURCE) and count > MAX_LINES and
            not any(JUSTIFICATION.search(line) for line in lines[:JUSTIFIED_WITHIN])):
        yield (f"{name}: {count} lines; split it, or say near the top why it is past "
               f"{MAX_LINES} lines")


def SelfTest():
    """The check finds what it is for; otherwise a clean result means nothing."""
    bad = {
        "tab": b"a\tb\n", "blank": b"a \n", "return": b"a\r\n", "end": b"a",
        "path": ("cd /" + "work/x\n").encode(), "unfinished": ("// TO" + "DO: x\n").encode(),
        "utf-8": b"\xff\n", "long.cc": b"x\n" * (MAX_LINES + 1),
    }
    missed = [name for name, data in bad.items() if not list(TextFindings(name, data))]
    good = b"// Past 500 lines: one table.\n" + b"x = \"shoal-XXXXXX\"\n" * (MAX_LINES + 1)
    if list(TextFindings("good.cc", good)):
        missed.append("good.cc")
    return [f"lint.py: its own check fails for '{name}'" for name in missed]


def Text(root):
    findings = SelfTest()
    checked = 0
    for name in Files(root):
        if name.endswith(BINARY):
            continue
        checked += 1
        findings += TextFindings(name, pathlib.Path(root, name).read_bytes())
    if checked == 0:
        findings.append(f"no files under {root}")
    return findings, f"{checked} files"


def Tool(names):
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    print(f"skipped: {names[0]} is not installed (launch/setup.sh installs it)")
    sys.exit(SKIP)


def Format(root):
    tool = Tool(["clang-format-14", "clang-format"])
    version = re.search(r"version (\d+)", subprocess.run([tool, "--version"], capture_output=True, text=True).stdout)
    if not version or version[1] != "14":
        print(f"skipped: {tool} is not version 14, and versions disagree about details")
        sys.exit(SKIP)
    files = [f for f in Files(root) if f.endswith(CPP)]
    done = subprocess.run([tool, "--dry-run", "--Werror", "--ferror-limit=1", *files], cwd=root,
                          capture_output=True, text=True)
    findings = [line for line in done.stderr.splitlines() if "error:" in line]
    if done.returncode and not findings:
        findings = done.stderr.splitlines()
    return findings, f"{len(files)} files"


def Tidy(root, build, only):
    tool = Tool(["clang-tidy-14", "clang-tidy"])
    commands = json.loads(pathlib.Path(build, "compile_commands.json").read_text())
    files = sorted({c["file"] for c in commands if c["file"].endswith(".cc")
                    and pathlib.Path(c["file"]).is_relative_to(root) and re.search(only, c["file"])})
    # g++'s warning names mean nothing to clang.
    options = ["--quiet", "-p", build, "--extra-arg=-Wno-unknown-warning-option", "--extra-arg=-Wno-everything"]

    def Check(file):
        done = subprocess.run([tool, *options, file], cwd=root, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if re.search(r": (error|warning): ", line)]
        if done.returncode and not lines:
            lines = [f"{file}: clang-tidy failed: {done.stderr[-500:]}"]
        return lines

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        findings = sorted({line for lines in pool.map(Check, files) for line in lines})
    if not files:
        findings.append(f"no sources in {build}/compile_commands.json")
    return findings, f"{len(files)} files"


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    kind, root = sys.argv[1], os.path.realpath(sys.argv[2])
    if kind == "text":
        findings, checked = Text(root)
    elif kind == "format":
        findings, checked = Format(root)
    else:
        findings, checked = Tidy(root, sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else "")
    print("\n".join(findings))
    print(f"lint {kind}: {len(findings)} findings in {checked}")
    sys.exit(1 if findings else 0)


main()
