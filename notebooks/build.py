"""Write notebooks/skin_qlora.ipynb, the whole way on a free GPU; its cells are here.

python -m notebooks.build
"""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parent / "skin_qlora.ipynb"
CELLS = [
    """# Teach a Qwen vision-language model about skin

The whole way on a free GPU (Colab: Runtime, Change runtime type, T4; Kaggle: Settings, Accelerator, GPU T4): a
drawn set first, in minutes, then your own photos. Without a GPU everything runs too, with a tiny model for
both.

Not a medical device. What a fine-tuned model says about a picture is not a diagnosis. Colab and Kaggle are
computers of others: upload photos of patients only where you are allowed to.

Run the cells from top to bottom. Each command is a process of its own, so that nothing has to be restarted
after installing. It was run from top to bottom on a CPU, and not on Colab or Kaggle yet.""",
    """## 1. Settings

All that you need to change is here.""",
    """REPOSITORY = ""   # address of this project's repository, if the notebook was opened without its folder
ANNOTATIONS = ""  # your annotation file, or a folder of class folders; empty: some of the drawn pictures
IMAGES = ""       # the image folder of an annotation file
MODEL = ""        # another model than the recipe's, as Qwen/Qwen2.5-VL-3B-Instruct
HUB_MODEL = ""    # you/skin: upload the adapter there at the end, to a private repository""",
    """## 2. Code and packages

On Kaggle, switch on Internet in the settings first. `pip` may complain that packages of the image
(`google-colab`, `bigframes`, `fastai`, ...) want other versions of `pandas`, `pillow`, `numpy` or `torch`: they
are not used here, and the complaints do no harm. Gradio, the page's library, wants a Pillow below 13, which
fits too.

If a later cell says that **the NVIDIA driver is too old**, PyTorch's newest build does not fit this machine.
Run `%pip install "torch>=2.11,<2.16" torchvision --index-url https://download.pytorch.org/whl/cu126` and go on.""",
    '''import html
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from IPython.display import HTML, Image, display


def run(command):
    """Run a command in a shell; an error of it stops the notebook."""
    print("$", command)
    get_ipython().system(command)
    if code := get_ipython().user_ns["_exit_code"]:
        raise RuntimeError(f"exit code {code}: the reason is above")


if not Path("train_sft.py").exists():
    if not Path("skin-vlm").exists():
        if not REPOSITORY:
            raise ValueError("REPOSITORY: name the address of this project's repository in the first cell")
        run(f"git clone --depth 1 {REPOSITORY} skin-vlm")
    os.chdir("skin-vlm")
if any(find_spec(name) is None for name in ("trl", "peft", "bitsandbytes", "imagehash")):
    run(f"{sys.executable} -m pip install --quiet -r requirements.txt")''',
    """## 3. Where results last

A session ends after 12 hours at most, earlier without use, and its disk is deleted. On Colab the results go to
your Drive, on Kaggle to `/kaggle/working` (switch on Persistence: Files, or use Save Version). Checkpoints are
there too: **in the next session, run all cells again, and training resumes** from the newest complete one.""",
    """if "google.colab" in sys.modules:
    from google.colab import drive

    drive.mount("/content/drive")
    OUTPUT = Path("/content/drive/MyDrive/skin-vlm")
elif Path("/kaggle/working").exists():
    OUTPUT = Path("/kaggle/working/skin-vlm")
else:
    OUTPUT = Path("outputs/notebook")
OUTPUT.mkdir(parents=True, exist_ok=True)
print("results:", OUTPUT.resolve())""",
    """## 4. The drawn set: does everything work?

600 drawn images of four conditions, a Qwen2.5-VL of random weights, and the same commands as for real data:
prepare, train in NF4, evaluate. About three minutes on the two cores of a free session.""",
    """STEPS = os.environ.get("DEMO_STEPS", "600")
run("python -m demo.draw --out outputs/demo/raw")
run("python -m demo.tiny_model --annotations outputs/demo/raw/annotations.json --out outputs/demo/base")
run("python -m data_prep convert --annotations outputs/demo/raw/annotations.json --images outputs/demo/raw/images "
    "--out outputs/demo/data --overwrite")""",
    """run(f"accelerate launch --num_processes 1 train_sft.py --config configs/demo.yaml --max_steps {STEPS}")
display(Image("outputs/demo/adapter/training_metrics.png"))""",
    '''def show_report(folder):
    """Show the page of an evaluation here."""
    page = html.escape((Path(folder) / "report.html").read_text(encoding="utf-8"))
    display(HTML(f'<iframe srcdoc="{page}" width="100%" height="800"></iframe>'))


run("python eval_sft.py --adapter outputs/demo/adapter --dataset outputs/demo/data --baseline --min-group 5 "
    "--max-new-tokens 16")
show_report("outputs/demo/adapter/eval")''',
    """## 5. The GPU chooses the recipe

A T4 or V100 has no bfloat16, so that its recipe computes in float16, with shorter packs. Kaggle's second T4 is
not used here; both are by `accelerate launch --config_file accelerate_config.yaml --num_processes 2`.""",
    '''def choose_recipe():
    """Return the recipe for the first GPU, and its memory, GB; without a GPU that for a CPU."""
    if shutil.which("nvidia-smi") is None:
        return "configs/first_try.yaml", None
    query = "nvidia-smi --query-gpu=name,compute_cap,memory.total --format=csv,noheader,nounits"
    found = subprocess.run(query.split(), capture_output=True, text=True)
    if found.returncode:
        return "configs/first_try.yaml", None
    name, capability, memory = found.stdout.splitlines()[0].split(", ")
    gigabytes = float(memory) / 1024
    print(f"{name}, {gigabytes:.0f} GB")
    if float(capability) < 8:
        return "configs/skin_16gb.yaml", gigabytes
    if gigabytes < 15:
        return "configs/skin_3b.yaml", gigabytes
    return "configs/skin.yaml", gigabytes


RECIPE, MEMORY = choose_recipe()
if MEMORY:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
print(RECIPE)''',
    """## 6. Your data

Upload an annotation file with its image folder, or a folder with a folder of photos for each class, to Drive
(`/content/drive/MyDrive/...`) or as an input on Kaggle (`/kaggle/input/...`), and name it in the first cell.
The forms of records are in `docs/data.md`. Without a name, some of the drawn pictures stand in, as class
folders.""",
    '''def copy_drawn(folder):
    """Copy 24 drawn pictures of two conditions into class folders."""
    for number in range(48):
        if condition := {0: "melanoma", 1: "psoriasis"}.get(number % 4):
            (folder / condition).mkdir(parents=True, exist_ok=True)
            shutil.copy(f"outputs/demo/raw/images/{number:04d}.jpg", folder / condition)
    return folder


source = ANNOTATIONS or copy_drawn(Path("outputs/notebook_photos"))
images = f"--images '{IMAGES}'" if IMAGES else ""
run(f"python -m data_prep convert --annotations '{source}' {images} --out data/notebook --overwrite")
run("python -m data_prep inspect data/notebook")''',
    """## 7. Plan, train

The plan says what the run needs, without loading the model. If training runs out of memory, its message names
the settings: add them to the command, as `--pack_tokens 1024`, or choose a smaller `MODEL` in the first cell.

If the session ends, run all cells in a new one: training resumes. `save_steps` says how much work that may
cost.""",
    """options = f"--dataset_path data/notebook --output_dir '{OUTPUT}/run' --save_steps 50"
if MODEL:
    options += f" --model_name_or_path {MODEL}"
run(f"python plan_run.py --config {RECIPE} {options}" + (f" --gpu {MEMORY:.1f}" if MEMORY else ""))""",
    """run(f"accelerate launch --num_processes 1 train_sft.py --config {RECIPE} {options}")
display(Image(f"{OUTPUT}/run/training_metrics.png"))""",
    """## 8. Did it help, and for whom?

Every test question is answered by the adapter, by the base alone, and by the adapter with the images shuffled.
What each figure means, and when not to believe it, is in `docs/evaluation.md`. With a few dozens of photos the
test split has a few questions: no accuracy is worth a number then.""",
    """run(f"python eval_sft.py --adapter '{OUTPUT}/run' --dataset data/notebook --baseline --max-new-tokens 64")
show_report(OUTPUT / "run" / "eval")""",
    """## 9. Ask

`python app.py` has a page for this on a computer of your own.""",
    """photo = "outputs/demo/raw/images/0000.jpg"  # one of yours
display(Image(photo))
run(f"python predict.py --adapter '{OUTPUT}/run' --image '{photo}' --question 'What skin condition is shown?' "
    "--max-new-tokens 64")""",
    """## 10. Keep it

The adapter is in `run` of the results. To upload it (adapter, curves, metrics and card; no image, no answer),
name `HUB_MODEL` in the first cell and give a token with the right to write: in Colab's secrets as `HF_TOKEN`,
or in the field that appears.""",
    """if HUB_MODEL:
    from huggingface_hub import get_token, login

    if not get_token():
        login()
    run(f"python push_adapter.py '{OUTPUT}/run' {HUB_MODEL}")
print(sorted(path.name for path in (OUTPUT / "run").iterdir()))""",
]


def build() -> str:
    """Return the notebook as JSON, without outputs."""
    cells = [make_cell(number, text) for number, text in enumerate(CELLS, start=1)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"accelerator": "GPU", "kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def make_cell(number: int, text: str) -> dict:
    """Return a cell: prose where the text starts with a heading, else code."""
    cell = {"id": f"cell-{number:02d}", "metadata": {}, "source": text.splitlines(keepends=True)}
    if text.startswith("#"):
        return {"cell_type": "markdown", **cell}
    return {"cell_type": "code", "execution_count": None, **cell, "outputs": []}


if __name__ == "__main__":
    NOTEBOOK.write_text(build(), encoding="utf-8")
    print(NOTEBOOK)
