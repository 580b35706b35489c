"""The `optimization` section: engines, batching, cache and tuning."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from muai_config.engines import ENGINES, EngineName
from muai_config.fields import Conflict, DistinctList, FolderPath, Section, section, setting
from muai_config.monitoring import AlertType

Dtype = Literal["auto", "fp16", "fp32", "bf16"]
ExecutionProvider = Literal[
    "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider", "OpenVINOExecutionProvider"
]
MAX_TOKENS = 100_000_000  # far beyond every context; catches a unit mistaken


class VLLMSettings(Section):
    enabled: bool = setting(True, describe="Whether the vLLM engine may serve. It needs the package vllm.")
    tensor_parallel_size: int = setting(
        1,
        ge=1,
        le=1024,
        unit="GPUs",
        example=4,
        env="MUAI_OPT_VLLM_TENSOR_PARALLEL",
        describe="How many GPUs share each layer of a model.",
    )
    pipeline_parallel_size: int = setting(
        1,
        ge=1,
        le=1024,
        unit="stages",
        example=2,
        describe="How many stages the layers of a model are spread over, each on GPUs of its own.",
    )
    dtype: Dtype = setting(
        "auto", describe="Number format of the weights; auto goes by the model and the GPU.", example="bf16"
    )
    max_model_len: int | None = setting(
        None,
        ge=1,
        le=MAX_TOKENS,
        unit="tokens",
        example=8192,
        describe="Longest sequence, prompt and answer together; null takes the model's own limit.",
    )
    gpu_memory_utilization: float = setting(
        0.9,
        ge=0.0,
        le=1.0,
        unit="fraction of GPU memory",
        example=0.85,
        env="MUAI_OPT_VLLM_GPU_MEMORY",
        describe="Share of the GPU's memory that vLLM takes. More makes room for larger batches, and out-of-memory "
        "errors likelier; 0.85 to 0.95 is usual.",
    )
    swap_space: int = setting(
        4,
        ge=0,
        le=65536,
        unit="GB",
        example=8,
        describe="Main memory for each GPU that takes keys and values which the GPU has no room for.",
    )
    block_size: int | None = setting(
        None,
        ge=1,
        le=4096,
        unit="tokens",
        example=32,
        describe="Keys and values are kept and found again in blocks of so many tokens; null takes 32 on a CPU, and "
        "vLLM's own size on a GPU.",
    )
    max_num_seqs: int | None = setting(
        None,
        ge=1,
        le=65536,
        unit="sequences",
        example=64,
        describe="Most sequences that are decoded at once; null takes vLLM's own number for the device.",
    )
    max_num_batched_tokens: int | None = setting(
        None,
        ge=1,
        le=MAX_TOKENS,
        unit="tokens",
        example=8192,
        describe="Most tokens that one step computes, of prompts and answers together; null takes vLLM's own number "
        "for the device.",
    )
    enforce_eager: bool | None = setting(
        None,
        example=True,
        describe="Whether models run as they are, not compiled when they are loaded; null compiles on a GPU alone.",
    )


class DeepSpeedSettings(Section):
    enabled: bool = setting(True, describe="Whether the DeepSpeed engine may serve. It needs the package deepspeed.")
    tensor_parallel: int = setting(
        1, ge=1, le=1024, unit="GPUs", example=2, describe="How many GPUs share each layer of a model."
    )
    pipeline_parallel: int = setting(
        1,
        ge=1,
        le=1024,
        unit="stages",
        example=1,
        describe="How many stages the layers of a model are spread over. DeepSpeed has none for inference with keys "
        "and values: with more than one the engine refuses its models and says so.",
    )
    dtype: Literal["fp16", "fp32", "bf16"] = setting("fp16", describe="Number format to compute in.", example="bf16")
    replace_with_kernel_inject: bool = setting(
        True,
        describe="Whether DeepSpeed's own fused kernels take the place of the model's layers where they can: on a GPU, "
        "for encoders and classifiers.",
    )
    zero_inference: Literal["auto", "never", "always"] = setting(
        "auto",
        describe="Whether weights lie in main memory and come to the GPU layer by layer; auto does it for models that "
        "do not fit.",
    )


class OnnxSettings(Section):
    enabled: bool = setting(
        True, describe="Whether the ONNX Runtime engine may serve. It needs onnxruntime or onnxruntime-gpu."
    )
    execution_providers: DistinctList[ExecutionProvider] = setting(
        ("CUDAExecutionProvider", "CPUExecutionProvider"),
        min_length=1,
        example=["CPUExecutionProvider"],
        describe="What runs the graph, preferred first; those that the machine lacks are passed over.",
    )
    optimization_level: Literal["none", "basic", "extended", "all"] = setting(
        "all", describe="How far the graph is rewritten for speed when a model is loaded.", example="basic"
    )
    enable_quantization: bool = setting(
        False, describe="Whether weights are stored as 8-bit integers: smaller, faster on a CPU, a little less exact."
    )
    quantized_min_cosine: float = setting(
        0.97,
        ge=-1.0,
        le=1.0,
        example=0.99,
        describe="Least cosine between the outputs of the quantized model and the original; one that is further off is "
        "not used, and the converted model with whole weights serves.",
    )
    cache_dir: FolderPath | None = setting(
        None,
        example="/var/cache/muai/onnx",
        describe="Where converted models are kept. null stands for onnx inside MUAI_HOME where that is set, else "
        "~/.cache/muai/onnx.",
    )
    tolerance: float = setting(
        1e-3,
        gt=0.0,
        le=1.0,
        example=0.0001,
        describe="Largest absolute difference allowed between the outputs of the converted model and the original; "
        "a conversion that is further off is not used.",
    )

    @property
    def conversions_folder(self) -> Path:
        """Where converted models are kept, `cache_dir` or the folder that stands for null."""
        return self.cache_dir or Path.home() / ".cache" / "muai" / "onnx"


class PyTorchSettings(Section):
    enabled: bool = setting(True, describe="Whether the PyTorch engine may serve.")
    dtype: Dtype = setting(
        "auto", describe="Number format of the weights; auto goes by the model and the hardware.", example="bf16"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = setting(
        "auto", describe="How attention is computed; auto takes the fastest that the model has.", example="sdpa"
    )
    compile: bool = setting(
        False, describe="Whether models are compiled when loaded: slow to start, faster afterwards."
    )
    num_threads: int | None = setting(
        None,
        ge=1,
        le=4096,
        unit="threads",
        example=8,
        describe="CPU threads for computing; large batches of an encoder are divided among them, all else has them "
        "together for each operation. null leaves PyTorch's own choice.",
    )


class BatcherSettings(Section):
    enabled: bool = setting(
        True, reloadable=True, describe="Whether requests are grouped into batches. When false each one runs alone."
    )
    max_batch_size: int = setting(
        32,
        ge=1,
        le=4096,
        unit="requests",
        example=64,
        reloadable=True,
        env="MUAI_OPT_BATCHER_MAX_SIZE",
        describe="Most requests in one batch. By GPU memory: 16 to 32 for 16 GB, 32 to 64 for 32 GB, 64 to 128 for "
        "80 GB.",
    )
    batch_timeout_ms: int = setting(
        50,
        ge=0,
        le=600_000,
        unit="ms",
        example=20,
        reloadable=True,
        env="MUAI_OPT_BATCHER_TIMEOUT",
        describe="Longest that a request waits for others to share its batch while an engine could take it. Less "
        "means answers sooner, more means fuller batches.",
    )
    adaptive_batching: bool = setting(
        True,
        reloadable=True,
        describe="Whether the load decides when a batch leaves: at once while an engine is idle, fuller while all "
        "are busy.",
    )
    min_batch_size: int = setting(
        1,
        ge=1,
        le=4096,
        unit="requests",
        example=4,
        reloadable=True,
        describe="Fewest requests worth a batch before the timeout; at the timeout whatever is there leaves.",
    )
    max_batch_tokens: int = setting(
        32768,
        ge=1,
        le=MAX_TOKENS,
        unit="tokens",
        example=16384,
        reloadable=True,
        describe="Most tokens in one batch, padding included: the longest request's length times their number.",
    )
    latency_target_ms: float | None = setting(
        None,
        gt=0.0,
        le=3_600_000.0,
        unit="ms",
        example=250.0,
        reloadable=True,
        describe="What 95 of 100 batches should take at most; batch sizes are held below what the measured speed "
        "allows. null sets no target.",
    )
    max_wait_ms: int = setting(
        5000,
        ge=0,
        le=3_600_000,
        unit="ms",
        example=1000,
        reloadable=True,
        describe="Longest that a request is passed over for others nearer in length or higher in priority.",
    )
    buffer_requests: int = setting(
        16384,
        ge=1,
        le=1_000_000,
        unit="requests",
        example=4096,
        describe="Most requests that a collector holds; the rest stay in the broker.",
    )
    buffer_mb: int = setting(
        256,
        ge=1,
        le=1_048_576,
        unit="MB",
        example=64,
        describe="Most memory for the requests that a collector holds; the rest stay in the broker.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.min_batch_size > self.max_batch_size:
            yield Conflict(
                "min_batch_size", self.min_batch_size, f"at most max_batch_size, which is {self.max_batch_size}"
            )


class CacheSettings(Section):
    enabled: bool = setting(
        True, describe="Whether keys and values of earlier turns are kept, so that a later turn need not repeat them."
    )
    max_memory_mb: int = setting(
        4096,
        ge=1,
        le=16_777_216,
        unit="MB",
        example=8192,
        reloadable=True,
        env="MUAI_OPT_CACHE_MAX_MEMORY",
        describe="Most memory for kept keys and values on one worker; a tenth to a fifth of the GPU's is usual.",
    )
    eviction_policy: Literal["lru", "fifo"] = setting(
        "lru",
        reloadable=True,
        example="fifo",
        describe="What goes first when memory runs out: the least recently used (lru) or the oldest (fifo).",
    )
    conversation_ttl_s: float = setting(
        1800.0,
        gt=0.0,
        le=31_536_000.0,
        unit="s",
        example=600.0,
        describe="How long a conversation may be silent before what is kept of it goes.",
    )


class AffinitySettings(Section):
    enabled: bool = setting(
        True,
        describe="Whether the turns of a conversation run one after the other, and at the worker that keeps its keys "
        "and values while that one lives and has room.",
    )
    spill_load: float = setting(
        1.5,
        gt=0.0,
        le=1000.0,
        unit="batches per slot",
        example=3.0,
        reloadable=True,
        describe="Unfinished batches in a worker's own queue, for each of its slots, from which on the turns of its "
        "conversations go to any worker of the engine that is idle.",
    )


class TunerSettings(Section):
    enabled: bool = setting(
        False,
        reloadable=True,
        describe="Whether batch size, timeout and cache size are adjusted to the load. Try it outside production "
        "first.",
    )
    observation_window_seconds: int = setting(
        300,
        ge=1,
        le=604_800,
        unit="s",
        example=600,
        reloadable=True,
        describe="How far back the tuner looks; a longer window gives steadier decisions.",
    )
    tuning_interval_seconds: int = setting(
        60, ge=1, le=604_800, unit="s", example=120, reloadable=True, describe="Time between two adjustments."
    )
    enable_batch_size_tuning: bool = setting(
        True, reloadable=True, describe="Whether the tuner may change batcher.max_batch_size."
    )
    enable_timeout_tuning: bool = setting(
        True, reloadable=True, describe="Whether the tuner may change batcher.batch_timeout_ms."
    )
    enable_cache_size_tuning: bool = setting(
        True, reloadable=True, describe="Whether the tuner may change cache.max_memory_mb."
    )
    target_latency_ms: float | None = setting(
        None,
        gt=0.0,
        le=3_600_000.0,
        unit="ms",
        example=200.0,
        reloadable=True,
        describe="Answers within this count as in time, from submission on. null takes batcher.latency_target_ms, and "
        "where that is null too monitoring.anomaly.latency_threshold_ms.",
    )
    min_batch_size: int = setting(
        1, ge=1, le=4096, unit="requests", example=4, reloadable=True, describe="The tuner sets no smaller batch size."
    )
    max_batch_size: int = setting(
        128,
        ge=1,
        le=4096,
        unit="requests",
        example=64,
        reloadable=True,
        describe="The tuner sets no larger batch size: what the GPU's memory has room for.",
    )
    min_batch_timeout_ms: int = setting(
        1, ge=0, le=600_000, unit="ms", example=5, reloadable=True, describe="The tuner sets no shorter timeout."
    )
    max_batch_timeout_ms: int = setting(
        500, ge=0, le=600_000, unit="ms", example=100, reloadable=True, describe="The tuner sets no longer timeout."
    )
    min_cache_mb: int = setting(
        256, ge=1, le=16_777_216, unit="MB", example=1024, reloadable=True, describe="The tuner sets no smaller cache."
    )
    max_cache_mb: int = setting(
        8192, ge=1, le=16_777_216, unit="MB", example=16384, reloadable=True, describe="The tuner sets no larger cache."
    )
    allowed_alerts: DistinctList[AlertType] = setting(
        (),
        example=["latency", "latency_anomaly"],
        reloadable=True,
        describe="Alerts that the tuner works on under; any other that is open holds it.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        for name in ("batch_size", "batch_timeout_ms", "cache_mb"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least > most:
                yield Conflict(f"min_{name}", least, f"at most max_{name}, which is {most}")


class OptimizationSettings(Section):
    enabled: bool = setting(
        True, describe="The main switch. When false, plain PyTorch serves everything and nothing else is tried."
    )
    engine_preference: DistinctList[EngineName] = setting(
        ENGINES,
        min_length=1,
        example=["onnx", "pytorch"],
        reloadable=True,
        describe="The engines to try, preferred first; the first that is available serves.",
    )
    fallback_on_error: bool = setting(
        True,
        reloadable=True,
        describe="Whether a request whose engine failed goes to the next engine. When false the client gets the error.",
    )
    vllm: VLLMSettings = section(VLLMSettings, "The vLLM engine: decoding with continuous batching.")
    deepspeed: DeepSpeedSettings = section(DeepSpeedSettings, "The DeepSpeed engine: models over several GPUs.")
    onnx: OnnxSettings = section(OnnxSettings, "The ONNX Runtime engine: converted models on GPU or CPU.")
    pytorch: PyTorchSettings = section(PyTorchSettings, "The PyTorch engine: every model, the last of every chain.")
    batcher: BatcherSettings = section(BatcherSettings, "How requests are grouped into batches.")
    cache: CacheSettings = section(CacheSettings, "The key and value cache that later turns of a chat reuse.")
    affinity: AffinitySettings = section(AffinitySettings, "Which worker the turns of a conversation go to.")
    tuner: TunerSettings = section(TunerSettings, "Automatic adjustment to the load.")
