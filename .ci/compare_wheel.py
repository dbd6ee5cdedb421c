"""Fail unless the wheel holds exactly the package files git tracks: `compare_wheel.py WHEEL`."""

import subprocess
import sys
import zipfile

ROOTS = {"sparseft/": "", "kernels/sparseft_kernels/": "kernels/"}


def main() -> int:
    tracked = subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True).stdout
    wanted = {
        path.removeprefix(strip)
        for path in tracked.splitlines()
        for root, strip in ROOTS.items()
        if path.startswith(root)
    }
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        names = {n for n in wheel.namelist() if not n.endswith("/")}
    got = {n for n in names if ".dist-info/" not in n}
    for path in sorted(wanted - got):
        print(f"missing from the wheel: {path}")
    for path in sorted(got - wanted):
        print(f"in the wheel but not in the tree: {path}")
    if not any(n.endswith("licenses/LICENSE") for n in names):
        print("the wheel holds no LICENSE")
        return 1
    print(f"{sys.argv[1]}: {len(got)} files, tree has {len(wanted)}")
    return int(got != wanted)


if __name__ == "__main__":
    sys.exit(main())
