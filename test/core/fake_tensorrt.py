"""Stand-ins for the tensorrt module, by version: what each has by name, and an engine that runs its ONNX on the CPU.

The names of 8.6 were read off the module itself (8.6.0); those of later versions are the ones NVIDIA documents. A plan
is the ONNX model with its weights. A context reads and writes the addresses bound to it, and refuses what TensorRT
refuses: a shape outside its profile, a tensor without an address.
"""

from __future__ import annotations

import enum
import json
from types import SimpleNamespace

import numpy as np
import onnx

from fake_gpu import FakeDriver, array_at

_MAGIC = b"FAKEPLAN"
SCRATCH = 4096
_NUMPY = {1: np.float32, 10: np.float16, 6: np.int32, 7: np.int64}
_KINDS = {"MatMul": "MATRIX_MULTIPLY", "Gemm": "MATRIX_MULTIPLY", "Transpose": "SHUFFLE", "Reshape": "SHUFFLE"}
_KINDS |= {"Unsqueeze": "SHUFFLE", "Cast": "CAST", "Gather": "GATHER", "Shape": "SHAPE", "Concat": "CONCATENATION"}
_KINDS |= {"Split": "SLICE", "Where": "SELECT", "ReduceMean": "REDUCE", "ReduceSum": "REDUCE", "ReduceMax": "REDUCE"}


class ILogger:
    def __init__(self) -> None:
        pass


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class ILayer:
    """A layer of a network: its tensors, and the types that its outputs are set to."""

    def __init__(self, name, kind, inputs, outputs) -> None:
        self.name, self.type, self.inputs, self.outputs = name, kind, inputs, outputs
        self.num_outputs, self.output_types, self.precision = len(outputs), {}, None

    def get_input(self, index):
        return self.inputs[index]

    def set_input(self, index, tensor):
        self.inputs[index] = tensor

    def get_output(self, index):
        return self.outputs[index]

    def set_output_type(self, index, dtype):
        self.output_types[index] = dtype


class IMatrixMultiplyLayer(ILayer):
    """The class that get_layer's result is given."""

    op1 = None


def make(version: str, driver: FakeDriver | None = None) -> SimpleNamespace:
    """``driver``: whose memory contexts work in and whose graphs capture them."""
    major, minor = (int(part) for part in version.split(".")[:2])
    at_least = (major, minor).__ge__
    trt = SimpleNamespace(__version__=version, ILogger=ILogger, IMatrixMultiplyLayer=IMatrixMultiplyLayer, float32=1)
    flags = ["EXPLICIT_BATCH"] if major < 11 else []
    flags += ["STRONGLY_TYPED"] if major >= 9 else []
    trt.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", flags, start=0)
    builder_flags = ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"] if major < 11 else ["REFIT"]
    trt.BuilderFlag = enum.IntEnum("BuilderFlag", builder_flags, start=0)
    if major < 9:
        trt.PreviewFeature = enum.Enum("PreviewFeature", ["FASTER_DYNAMIC_SHAPES_0805"])
    trt.LayerType = enum.Enum("LayerType", sorted({*_KINDS.values(), "ELEMENTWISE", "CONSTANT", "IDENTITY"}))
    trt.MatrixOperation = enum.Enum("MatrixOperation", ["NONE", "TRANSPOSE", "VECTOR"])
    trt.MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
    trt.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["DETAILED"])
    members = ["add_matrix_multiply"] + (["add_attention"] if at_least((10, 14)) else [])
    members += ["add_kv_cache_update"] if at_least((10, 15)) else []
    trt.INetworkDefinition = SimpleNamespace(**dict.fromkeys(members))
    if major >= 10:
        trt.IProgressMonitor = IProgressMonitor
        strategy = ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"]
        trt.ExecutionContextAllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", strategy)
    trt.configs, trt.networks, trt.contexts = [], [], []
    trt.Builder = lambda logger: FakeBuilder(trt, logger)
    trt.OnnxParser = lambda network, logger: FakeParser(network, logger)
    trt.Runtime = lambda logger: FakeRuntime(trt, logger, driver)
    return trt


# --- building -----------------------------------------------------------------------------------------------


class FakeBuilder:
    """trt.Builder: a plan is the version and the profiles as JSON, then the ONNX model."""

    def __init__(self, trt, logger) -> None:
        self.trt, self.logger = trt, logger

    def create_network(self, flags):
        network = SimpleNamespace(flags=flags, layers=[], model=None, trt=self.trt)
        network.get_layer = lambda i: network.layers[i]
        self.trt.networks.append(network)
        return network

    def create_builder_config(self):
        return FakeConfig(self.trt)

    def create_optimization_profile(self):
        shapes = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *three: shapes.update({name: three}))

    def build_serialized_network(self, network, config):
        if config.pools[self.trt.MemoryPoolType.WORKSPACE] < 1 << 20:
            self.logger.log(SimpleNamespace(name="ERROR"), "Could not find any implementation: out of memory")
            return None
        header = {"version": self.trt.__version__, "profiles": [profile.shapes for profile in config.profiles]}
        text = json.dumps(header).encode()
        return _MAGIC + len(text).to_bytes(4, "little") + text + network.model.SerializeToString()


class FakeConfig:
    """trt.IBuilderConfig; keeps what it is told."""

    def __init__(self, trt) -> None:
        self.pools, self.flags, self.profiles, self.caches, self.previews = {}, set(), [], [], {}
        if hasattr(trt, "IProgressMonitor"):
            self.progress_monitor = None
        self.set_memory_pool_limit = self.pools.__setitem__
        self.set_flag = self.flags.add
        self.set_preview_feature = self.previews.__setitem__
        trt.configs.append(self)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, data):
        return SimpleNamespace(data=bytes(data), serialize=lambda: b"timed " + bytes(data)[:6])

    def set_timing_cache(self, cache, ignore_mismatch):
        self.caches.append(cache.data)
        return not cache.data.startswith(b"of another GPU")


class FakeParser:
    """trt.OnnxParser: reads the model with the package onnx."""

    def __init__(self, network, logger) -> None:
        self.network, self.num_errors = network, 0

    def get_error(self, index):
        return "In node 3 with name: layer0/qkv: unsupported"

    def parse_from_file(self, path):
        model = onnx.load(path)
        if not model.graph.node:
            self.num_errors = 1
            return False
        inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
        types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
        kinds = self.network.trt.LayerType
        tensors = {}

        def tensor(name):
            return tensors.setdefault(name, SimpleNamespace(name=name, dtype=types.get(name)))

        for node in model.graph.node:
            kind = kinds[_KINDS.get(node.op_type, "ELEMENTWISE")]
            layer = ILayer(node.name, kind, [tensor(n) for n in node.input], [tensor(n) for n in node.output])
            self.network.layers.append(layer)
        self.network.num_layers = len(self.network.layers)
        self.network.model = model
        return True


# --- running ------------------------------------------------------------------------------------------------


class FakeRuntime:
    """trt.Runtime: makes an engine of a plan of FakeBuilder's."""

    engine_host_code_allowed = True

    def __init__(self, trt, logger, driver) -> None:
        self.trt, self.logger, self.driver = trt, logger, driver

    def deserialize_cuda_engine(self, plan):
        assert self.engine_host_code_allowed is False
        data = bytes(plan)
        length = int.from_bytes(data[8:12], "little")
        error = "Serialization assertion magicTagRead == kMAGIC_TAG failed"
        if data[:8] == _MAGIC:
            try:
                header = json.loads(data[12 : 12 + length])
                model = onnx.load_from_string(data[12 + length :])
                if header["version"] == self.trt.__version__:
                    return FakeEngine(self.trt, model, header["profiles"], self.driver, self.logger)
                error = "Version tag does not match"
            except ValueError:
                pass
            except Exception as caught:  # protobuf's own
                error = str(caught)
        self.logger.log(SimpleNamespace(name="ERROR"), error)
        return None


class FakeEngine:
    """trt.ICudaEngine of one ONNX model."""

    def __init__(self, trt, model, profiles, driver, logger) -> None:
        self.trt, self.model, self.profiles, self.driver, self.logger = trt, model, profiles, driver, logger
        version = tuple(int(part) for part in trt.__version__.split(".")[:2])
        if version >= (10, 1):
            self.device_memory_size_v2 = SCRATCH
        if version < (11, 0):
            self.device_memory_size = SCRATCH
            self.create_execution_context_without_device_memory = lambda: self._context(version)
        if version >= (10, 0):
            self.create_execution_context = lambda strategy: self._context(version, strategy)
        self._names = [value.name for value in (*model.graph.input, *model.graph.output)]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index):
        return self._names[index]

    def _context(self, version, strategy=None):
        if strategy is not None:
            assert strategy is self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = FakeContext(self)
        if version >= (10, 1):
            context.set_device_memory = lambda address, size: setattr(context, "device_memory", address)
        self.trt.contexts.append(context)
        return context


def _session(model):
    if model.opset_import[0].version >= 24:  # not in every ONNX Runtime this is tested with
        from onnx.reference import ReferenceEvaluator

        return ReferenceEvaluator(model)
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


class FakeContext:
    """trt.IExecutionContext: runs the model with ONNX Runtime on arrays at the driver's addresses."""

    def __init__(self, engine) -> None:
        self.engine, self.addresses, self.shapes, self.profile = engine, {}, {}, None
        self._device_memory = None
        self._session = _session(engine.model)

    @property
    def device_memory(self):
        return self._device_memory

    @device_memory.setter
    def device_memory(self, address):
        """Like 8.6, log an address that is refused, and keep the one before."""
        if address % 512:
            error = "setDeviceMemory: memory must be aligned on 512 byte boundary."
            self.engine.logger.log(SimpleNamespace(name="ERROR"), error)
        else:
            self._device_memory = address

    def set_optimization_profile_async(self, index, stream):
        self.profile = self.engine.profiles[index]
        return True

    def set_input_shape(self, name, shape):
        least, _, largest = self.profile[name]
        inside = all(low <= size <= high for low, size, high in zip(least, shape, largest, strict=True))
        if inside:
            self.shapes[name] = tuple(shape)
        return inside

    def set_tensor_address(self, name, address):
        assert address % 256 == 0
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        if self.device_memory is None or set(self.addresses) != set(self.engine._names):
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)  # a graph keeps what it captured
        self.engine.driver.run(lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes, addresses):
        feeds = {}
        for value in self.engine.model.graph.input:
            tensor = value.type.tensor_type
            shape = shapes.get(value.name) or tuple(d.dim_value for d in tensor.shape.dim)
            feeds[value.name] = array_at(addresses[value.name], shape, _NUMPY[tensor.elem_type]).copy()
        names = [value.name for value in self.engine.model.graph.output]
        for name, result in zip(names, self._session.run(names, feeds), strict=True):
            array_at(addresses[name], result.shape, result.dtype)[...] = result
