"""The public names for type checkers and editors; `__init__.py` imports each on first use."""

from lorakit import kernels as kernels
from lorakit.adapters.attach import attach as attach
from lorakit.adapters.combine import combine_adapters as combine_adapters
from lorakit.adapters.eva import eva as eva
from lorakit.adapters.loftq import loftq as loftq
from lorakit.adapters.manage import adapter_names as adapter_names
from lorakit.adapters.manage import adapter_rows as adapter_rows
from lorakit.adapters.manage import delete_adapter as delete_adapter
from lorakit.adapters.manage import detach as detach
from lorakit.adapters.manage import disable_adapters as disable_adapters
from lorakit.adapters.manage import set_adapter as set_adapter
from lorakit.adapters.merge import Drift as Drift
from lorakit.adapters.merge import merge as merge
from lorakit.adapters.merge import merge_and_unload as merge_and_unload
from lorakit.adapters.merge import unmerge as unmerge
from lorakit.adapters.methods.adalora import AdaLoraConfig as AdaLoraConfig
from lorakit.adapters.methods.adalora import adalora_allocate as adalora_allocate
from lorakit.adapters.methods.adalora import adalora_orthogonality as adalora_orthogonality
from lorakit.adapters.methods.ia3 import IA3Config as IA3Config
from lorakit.adapters.methods.prompts import PrefixTuningConfig as PrefixTuningConfig
from lorakit.adapters.methods.prompts import PromptEncoderConfig as PromptEncoderConfig
from lorakit.adapters.methods.prompts import PromptTuningConfig as PromptTuningConfig
from lorakit.adapters.methods.vera import VeraConfig as VeraConfig
from lorakit.adapters.new_tokens import add_tokens as add_tokens
from lorakit.adapters.peft_files.convert import convert_adapter as convert_adapter
from lorakit.adapters.peft_files.inspect import describe_adapter as describe_adapter
from lorakit.adapters.peft_files.load import load_adapter as load_adapter
from lorakit.adapters.peft_files.save import save_adapter as save_adapter
from lorakit.config.adapters import LoraConfig as LoraConfig
from lorakit.config.errors import LorakitError as LorakitError
from lorakit.config.quantization import QuantConfig as QuantConfig
from lorakit.config.run import RunConfig as RunConfig
from lorakit.config.training import TrainConfig as TrainConfig
from lorakit.data.examples import encode_rows as encode_rows
from lorakit.data.inspect import lint_rows as lint_rows
from lorakit.data.inspect import show_rows as show_rows
from lorakit.data.mend import Mended as Mended
from lorakit.data.mend import balance_rows as balance_rows
from lorakit.data.mend import dedup_rows as dedup_rows
from lorakit.data.mend import sample_rows as sample_rows
from lorakit.data.packing import collate_packed as collate_packed
from lorakit.data.packing import pack_rows as pack_rows
from lorakit.data.packing import padding_share as padding_share
from lorakit.data.rows import read_rows as read_rows
from lorakit.data.splitting import split_rows as split_rows
from lorakit.data.write import write_rows as write_rows
from lorakit.evaluation import metrics as metrics
from lorakit.evaluation.completions import Completion as Completion
from lorakit.evaluation.completions import complete_rows as complete_rows
from lorakit.evaluation.completions import read_completions as read_completions
from lorakit.evaluation.completions import write_completions as write_completions
from lorakit.evaluation.evaluate import evaluate as evaluate
from lorakit.evaluation.intervals import Comparison as Comparison
from lorakit.evaluation.intervals import Interval as Interval
from lorakit.evaluation.intervals import bootstrap_interval as bootstrap_interval
from lorakit.evaluation.intervals import compare_predictions as compare_predictions
from lorakit.evaluation.metrics import rouge_l as rouge_l
from lorakit.evaluation.plots import plot_runs as plot_runs
from lorakit.evaluation.quantization_report import quantize_report as quantize_report
from lorakit.export.card import write_card as write_card
from lorakit.export.check import ExportCheck as ExportCheck
from lorakit.export.check import check_export as check_export
from lorakit.export.gguf import GgufFile as GgufFile
from lorakit.export.gguf import export_gguf as export_gguf
from lorakit.export.gguf_adapter import export_gguf_adapter as export_gguf_adapter
from lorakit.export.importance import Importance as Importance
from lorakit.export.importance import importance as importance
from lorakit.export.importance import load_importance as load_importance
from lorakit.export.mlx import MlxAdapter as MlxAdapter
from lorakit.export.mlx import export_mlx as export_mlx
from lorakit.export.mlx import import_mlx as import_mlx
from lorakit.export.ollama import OllamaFiles as OllamaFiles
from lorakit.export.ollama import export_ollama as export_ollama
from lorakit.export.push import push_to_hub as push_to_hub
from lorakit.export.servers import ServedAdapter as ServedAdapter
from lorakit.export.servers import export_for_server as export_for_server
from lorakit.files.hub import fetch_adapter as fetch_adapter
from lorakit.inference.engine import Engine as Engine
from lorakit.inference.generate import generate as generate
from lorakit.inference.generate import generate_batch as generate_batch
from lorakit.inference.request import Event as Event
from lorakit.inference.request import Request as Request
from lorakit.inference.sampling import Sampling as Sampling
from lorakit.models.config import ModelConfig as ModelConfig
from lorakit.models.load import load_model as load_model
from lorakit.models.packed_layers import quantize as quantize
from lorakit.models.resize import resize_embeddings as resize_embeddings
from lorakit.models.save import save_model as save_model
from lorakit.models.tokenizer_files import load_tokenizer as load_tokenizer
from lorakit.serving.serve import serve as serve
from lorakit.training import memory as memory
from lorakit.training import optim as optim
from lorakit.training.cores import own_threads as own_threads
from lorakit.training.losses.preference import dpo_loss as dpo_loss
from lorakit.training.losses.preference import orpo_loss as orpo_loss
from lorakit.training.losses.preference import pair_losses as pair_losses
from lorakit.training.losses.reference import Reference as Reference
from lorakit.training.memory import tune_allocator as tune_allocator
from lorakit.training.memory_plan.cards import Card as Card
from lorakit.training.memory_plan.cards import find_card as find_card
from lorakit.training.memory_plan.plan import MemoryPlan as MemoryPlan
from lorakit.training.memory_plan.plan import plan_memory as plan_memory
from lorakit.training.profile import profile_training as profile_training
from lorakit.training.train import train as train

__version__: str
__all__: list[str]

# The old names of four functions; they leave with lorakit 0.2.
allocate = adalora_allocate
orthogonality = adalora_orthogonality
pack = pack_rows
split = split_rows
