"""Install the wheel and the source distribution in fresh environments, and try them: the core alone, then each extra.

python tools/try_distribution.py dist
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CORE = """
import sys, torch, lightning as L, lit_prune
from importlib.metadata import version
from transformers import LlamaConfig, LlamaForCausalLM
from lit_prune.callbacks import StructuredPruning

assert lit_prune.__version__ == version("lit_prune"), (lit_prune.__version__, version("lit_prune"))
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = LlamaForCausalLM(LlamaConfig(**sizes))

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

module = Module()
dense = sum(p.numel() for p in module.parameters())
trainer = L.Trainer(
    max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[StructuredPruning(pruning_ratio=0.2)]
)
trainer.fit(module, torch.utils.data.DataLoader(torch.randint(0, 64, (8, 12)), batch_size=2))
assert 0.7 < sum(p.numel() for p in module.parameters()) / dense < 0.85
lit_prune.save_pruned(module.net, "model")
lit_prune.load_pruned("model", verify=True)
trainer.callbacks[0].table.to_parquet("table.parquet")
"""

# by extra: a script that ends in MissingPackageError without it, and without an error with it
EXTRAS = {
    "plots": "from lit_prune.callbacks import PruningReport; PruningReport('out')",
    "lora": "from lit_prune.callbacks import LoRARecovery; LoRARecovery()",
    "gguf": """
from lit_prune import extras, load_pruned
from lit_prune.io.gguf import save_gguf
try:
    save_gguf(load_pruned("model"), "model.gguf", tokenizer=None)
except extras.MissingPackageError:
    raise
except Exception as error:
    # the tiny model has no tokenizer: the package was found, which is what is asked here
    print(type(error).__name__, error)
""",
    "cli": "from lit_prune.cli import main; main(['plan', '--help'])",
}


def run(*command: object, folder: Path, fails: bool = False) -> str:
    """Run a command, and give what it printed.

    Raises:
        SystemExit: If it fails, or does not fail where it should.
    """
    done = subprocess.run([str(c) for c in command], cwd=folder, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    if bool(done.returncode) != fails:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{printed[-3000:]}")
    return printed


def environment(folder: Path) -> Path:
    """Make an environment, and give its interpreter."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def main() -> None:
    """Try what lies in the folder that is given."""
    (wheel,), (source,) = (sorted(Path(sys.argv[1]).resolve().glob(form)) for form in ("*.whl", "*.tar.gz"))
    constraints = ["-c", ROOT / "constraints.txt"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = environment(folder / "wheel")
        install = [python, "-m", "pip", "install", "--quiet", *constraints]
        run(*install, "torch", folder=folder)
        run(*install, wheel, folder=folder)
        run(python, "-c", CORE, folder=folder)
        print("the wheel without extras: installed and tried")
        for extra, script in EXTRAS.items():
            said = run(python, "-c", script, folder=folder, fails=True)
            if f"lit_prune[{extra}]" not in said:
                raise SystemExit(f"Without the extra {extra!r} the error does not name it:\n{said[-3000:]}")
            run(*install, f"{wheel}[{extra}]", folder=folder)
            run(python, "-c", script, folder=folder)
            print(f"the extra {extra}: named by the error without it, and tried")
        other = environment(folder / "source")
        run(other, "-m", "pip", "install", "--quiet", "--no-deps", source, folder=folder)
        # its dependencies are those just installed; its own files come first
        packages = next((folder / "wheel" / "lib").iterdir()) / "site-packages"
        (next((folder / "source" / "lib").iterdir()) / "site-packages" / "shared.pth").write_text(str(packages))
        run(other, "-c", CORE, folder=folder)
        print("the source distribution: installed and tried")


if __name__ == "__main__":
    main()
