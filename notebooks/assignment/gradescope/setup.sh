#!/usr/bin/env bash
# Run once, when the image is built: what a student installs, too. The CPU build of torch is enough,
# and much smaller: set PIP_INDEX_URL here to an index that has it.
set -euo pipefail
root=${AUTOGRADER:-/autograder}
apt-get install -y python3 python3-pip python3-venv
python3 -m venv "$root/venv"
"$root/venv/bin/pip" install -r "$root/source/requirements.txt"
