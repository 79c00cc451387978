"""``make figures``: keeps an executed notebook under its megabyte. Pictures get 256 colours, widgets' state goes."""

import base64
import io
import sys

import nbformat
from PIL import Image


def main() -> None:
    for path in sys.argv[1:]:
        notebook = nbformat.read(path, 4)
        for key in ("widgets", "papermill"):
            notebook.metadata.pop(key, None)
        for cell in notebook.cells:
            cell.metadata.pop("papermill", None)
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
                    small = io.BytesIO()
                    picture.quantize(256).save(small, "PNG", optimize=True)
                    output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
