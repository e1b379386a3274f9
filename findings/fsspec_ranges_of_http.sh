#!/bin/sh
# fsspec 2026.9.0 with aiohttp 3.14.5: parts of files at an http server that does not know ranges, as Python's own.
#
# Seen here, for 100 bytes at 512 of a file of 10,240 bytes, from `python -m http.server`, which answers 200 with everything:
#   cat_file(url, start=512, end=612) and cat_ranges([url], [512], [612]): all 10,240 bytes, beginning with the first of the
#   file, without an error: whoever takes the first 100 of them, or does not count, has the wrong ones;
#   a file of open() refuses to seek: "The HTTP server doesn't appear to support range requests";
#   of a local file cat_file and cat_ranges give the 100 bytes.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" fsspec==2026.9.0 aiohttp==3.14.5
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import fsspec

START, END = 512, 612
print(f"fsspec {fsspec.__version__}, aiohttp {aiohttp.__version__}")
folder = Path(sys.argv[1])
content = b"".join(n.to_bytes(4, "big") for n in range(2_560))
(folder / "numbers").write_bytes(content)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/numbers"
http, local = fsspec.filesystem("http"), fsspec.filesystem("file")
found = {
    "cat_file": http.cat_file(url, start=START, end=END),
    "cat_ranges": http.cat_ranges([url], [START], [END])[0],
    "local cat_file": local.cat_file(str(folder / "numbers"), start=START, end=END),
    "local cat_ranges": local.cat_ranges([str(folder / "numbers")], [START], [END])[0],
}
try:
    with http.open(url, block_size=256) as file:
        file.seek(START)
        file.read(END - START)
    refused = ""
except ValueError as error:
    refused = str(error)
for name, data in found.items():
    print(f"{name}: {len(data)} bytes, {'right' if data == content[START:END] else 'wrong'}")
print(f"open: {refused or 'no error'}")
same = found["cat_file"] == found["cat_ranges"] == content and "range requests" in refused
same = same and found["local cat_file"] == found["local cat_ranges"] == content[START:END]
print("as stated" if same else "changed")
sys.exit(not same)
PY
