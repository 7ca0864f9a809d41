"""What each library says when memory is short or a device is lost, in its own words and types, is told apart from faults."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnxruntime as ort
import pytest
import torch

from probescore_server.errors import ProbeRefused
from probescore_server.failures import FailureKind, kind_of

MEMORY_SHORT, DEVICE_LOST, OTHER = FailureKind.MEMORY_SHORT, FailureKind.DEVICE_LOST, FailureKind.OTHER
RUN = ort.capi.onnxruntime_pybind11_state
TRAILER = (
    "\nSearch for `{name}' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information."
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect."
    "\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
NODE = "[ONNXRuntimeError] : {} : Non-zero status code returned while running Gemm node. Name:'/fc1/Gemm' Status Message: "
ARENA = (
    "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal("
    "size_t, bool, onnxruntime::Stream*, bool, onnxruntime::WaitNotificationFn) "
)
CALL = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:129 std::conditional_t<THRW, void, onnxruntime::common::Status> "
    "onnxruntime::CudaCall(ERRTYPE, const char*, const char*, ERRTYPE, const char*, const char*, int) {} ; GPU=0 ; hostname=n1 ; "
    "file=/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_execution_provider.cc ; line=448 ; expr={}; "
)


def accelerator(text: str, name: str) -> Exception:
    """As torch raises it: the text, then how to debug it."""
    return torch.AcceleratorError(text + TRAILER.format(name=name))


SHORT: dict[str, Exception] = {
    "torch's own type": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.22 GiB. GPU 0 has a total capacity of 15.69 GiB"),
    "a CUDA error": accelerator("CUDA error: out of memory", "cudaErrorMemoryAllocation"),
    "a CUDA error of older versions": RuntimeError("CUDA error: out of memory"),
    "the driver, with expandable segments": RuntimeError("CUDA driver error: out of memory"),
    "HIP": accelerator("HIP error: out of memory", "hipErrorOutOfMemory"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuBLAS as an accelerator's error": torch.AcceleratorError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "torch on a CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 34359738368 "
        "bytes. Error code 12 (Cannot allocate memory)"
    ),
    "torch that maps a file": RuntimeError("unable to mmap 4096 bytes from file </m/model.safetensors>: Cannot allocate memory (12)"),
    "Python": MemoryError(),
    "numpy": np._core._exceptions._ArrayMemoryError((2**33,), np.dtype("f8")),
    "the system": OSError(12, "Cannot allocate memory"),
    "C++": RuntimeError("std::bad_alloc"),
    "onnxruntime's arena": RUN.RuntimeException(
        NODE.format("6 : RUNTIME_EXCEPTION") + ARENA + "Failed to allocate memory for requested buffer of size 2830172160\n"
    ),
    "onnxruntime's arena, in the newest": RUN.Fail(
        NODE.format("1 : FAIL") + ARENA + "Failed to allocate memory for requested buffer of size 8"
    ),
    "onnxruntime at its limit": RUN.RuntimeException(
        NODE.format("6 : RUNTIME_EXCEPTION") + ARENA + "Available memory of 0 is smaller than requested bytes of 2048\n"
    ),
    "onnxruntime without an arena": RUN.RuntimeException(NODE.format("6 : RUNTIME_EXCEPTION") + "std::bad_alloc"),
    "onnxruntime on CUDA": RUN.RuntimeException(CALL.format("CUDA failure 2: out of memory", "cudaMalloc((void**)&p, size)")),
    "onnxruntime's cuBLAS": RUN.RuntimeException(
        CALL.format("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", "cublasCreate(&cublas_handle_)")
    ),
}

LOST: dict[str, Exception] = {
    "an illegal access": accelerator("CUDA error: an illegal memory access was encountered", "cudaErrorIllegalAddress"),
    "an illegal access of older versions": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "an assertion": accelerator("CUDA error: device-side assert triggered", "cudaErrorAssert"),
    "a failed launch": accelerator("CUDA error: unspecified launch failure", "cudaErrorLaunchFailure"),
    "a launch that timed out": accelerator("CUDA error: the launch timed out and was terminated", "cudaErrorLaunchTimeout"),
    "an address": accelerator("CUDA error: misaligned address", "cudaErrorMisalignedAddress"),
    "memory that is broken": accelerator("CUDA error: uncorrectable ECC error encountered", "cudaErrorECCUncorrectable"),
    "an unknown error": accelerator("CUDA error: unknown error", "cudaErrorUnknown"),
    "a busy device": accelerator("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "cudaErrorDevicesUnavailable"),
    "another way to say unknown": RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment"),
    "an accelerator's error without a text": torch.AcceleratorError(""),
    "HIP": torch.AcceleratorError("HIP error: unspecified launch failure"),
    "Triton": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k, &alpha)`"),
    "cuBLAS, inside": RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    "cuDNN, inside": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    "onnxruntime": RUN.Fail(CALL.format("CUDA failure 700: an illegal memory access was encountered", "cudaStreamSynchronize(stream_)")),
    "onnxruntime's node": RUN.Fail(NODE.format("1 : FAIL") + "CUDA error executing cudaMemcpy(dst_data, src_data, bytes)"),
    "onnxruntime's cuBLAS": RUN.Fail(CALL.format("CUBLAS failure 14: CUBLAS_STATUS_INTERNAL_ERROR", "cublasGemmHelper(handle)")),
    "onnxruntime's cuDNN": RUN.Fail(CALL.format("CUDNN failure 5003: CUDNN_STATUS_EXECUTION_FAILED_CUDART", "cudnnSoftmaxForward(handle)")),
    "memory asked of a context that is lost": RUN.Fail(
        CALL.format("CUDA failure 700: an illegal memory access was encountered", "cudaMalloc(&p)") + "Failed to allocate memory"
    ),
}

FAULTS: dict[str, Exception] = {
    "an index": IndexError("index out of range in self"),
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    "onnxruntime": RUN.InvalidArgument("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Invalid rank for input: x Got: 1 Expected: 2"),
    "torch without CUDA": AssertionError("Torch not compiled with CUDA enabled"),
    "what cuDNN does not do": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. Non-contiguous input?"),
    "a name": KeyError("memory"),
    "a probe that looks at memory": RuntimeError("probe memory_use@1 has no label"),
}


@pytest.mark.parametrize("said", SHORT)
def test_short_memory_is_one_kind_whoever_says_it(said: str) -> None:
    assert kind_of(SHORT[said]) is MEMORY_SHORT


@pytest.mark.parametrize("said", LOST)
def test_a_lost_device_is_one_kind_whoever_says_it(said: str) -> None:
    assert kind_of(LOST[said]) is DEVICE_LOST


@pytest.mark.parametrize("said", FAULTS)
def test_faults_are_neither(said: str) -> None:
    assert kind_of(FAULTS[said]) is OTHER


def test_what_an_error_was_raised_for_counts_also_if_it_hides_it() -> None:
    refused = ProbeRefused("p.onnx", "graph", "a graph that onnxruntime refuses", "one that it can run")
    refused.__context__, refused.__suppress_context__ = RUN.Fail("std::bad_alloc"), True
    assert kind_of(refused) is MEMORY_SHORT
    cleaning, asking = RuntimeError("cleaning up failed"), MemoryError()
    cleaning.__context__, asking.__cause__ = asking, torch.AcceleratorError("CUDA error: unspecified launch failure")
    asking.__cause__.__context__ = cleaning  # a circle
    assert kind_of(cleaning) is DEVICE_LOST


AT_ITS_LIMIT = """
import resource
import numpy as np, onnx, onnxruntime as ort, torch
from onnx import TensorProto, helper
from probescore_server.failures import kind_of
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
ort.set_default_logger_severity(4)

def session(arena):
    values = [helper.make_tensor_value_info(name, kind, [None]) for name, kind in (("x", 1), ("shape", 7), ("y", 1))]
    graph = helper.make_graph([helper.make_node("Expand", ["x", "shape"], ["y"])], "g", values[:2], values[2:])
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena, options.intra_op_num_threads = arena, 1
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ort.InferenceSession(model.SerializeToString(), options)

big = {"x": np.ones(1, np.float32), "shape": np.array([2**33])}
for ask in (
    lambda: torch.empty(2**33),
    lambda: np.empty(2**33),
    lambda: bytearray(2**36),
    lambda: session(True).run(None, big),
    lambda: session(False).run(None, big),
):
    try:
        ask()
    except BaseException as error:
        print(kind_of(error).name)
"""


def test_a_process_at_its_limit_is_short_of_memory_in_every_library() -> None:
    said = subprocess.run([sys.executable, "-c", AT_ITS_LIMIT], capture_output=True, text=True, check=True).stdout.split()
    assert said == ["MEMORY_SHORT"] * 5
