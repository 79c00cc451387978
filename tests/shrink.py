"""``make figures``: keeps an executed notebook under its megabyte, and its progress bars to what they came to.

Pictures get 256 colours, those in PNG files too; the widgets' state goes.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from PIL import Image


def main() -> None:
    for path in sys.argv[1:]:
        if path.endswith(".png"):
            Path(path).write_bytes(with_few_colours(Path(path).read_bytes()))
            continue
        notebook = nbformat.read(path, 4)
        for key in ("widgets", "papermill"):
            notebook.metadata.pop(key, None)
        for cell in notebook.cells:
            cell.metadata.pop("papermill", None)
            if bars := [o for o in cell.get("outputs", []) if o.get("name") == "stderr"]:
                lines = "".join(o.text for o in bars).split("\n")
                bars[0].text = "\n".join(line.split("\r")[-1] for line in lines)
                cell.outputs = [o for o in cell.outputs if o is bars[0] or o.get("name") != "stderr"]
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    few = with_few_colours(base64.b64decode(output.data["image/png"]))
                    output.data["image/png"] = base64.b64encode(few).decode()
        nbformat.write(notebook, path)


def with_few_colours(png: bytes) -> bytes:
    picture = Image.open(io.BytesIO(png))
    if picture.mode == "P":
        return png
    small = io.BytesIO()
    picture.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return small.getvalue()


if __name__ == "__main__":
    main()
