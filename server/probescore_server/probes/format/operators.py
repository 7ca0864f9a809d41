"""Lists the ONNX operators that a probe's graph may use: operators that always give the same result for the same input.

Every operator that is not listed is refused, so that no unexamined operator is ever run. Not listed are those of ONNX's own operators that
draw random numbers, that work on text, images or maps, or that work on values which may be absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx

_STANDARD = """
    Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift BitwiseAnd
    BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast CastLike Ceil Celu CenterCropPad Clip Col2Im Compress Concat
    ConcatFromSequence Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum DFT DeformConv DepthToSpace
    DequantizeLinear Det Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul MatMulInteger Max MaxPool
    MaxRoiPool MaxUnpool Mean MeanVarianceNormalization MelWeightMatrix Min Mish Mod Mul Neg NegativeLogLikelihoodLoss
    NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear RNN Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    ReverseSequence RoiAlign Round STFT Scan Scatter ScatterElements ScatterND Selu SequenceAt SequenceConstruct SequenceEmpty
    SequenceErase SequenceInsert SequenceLength Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax SoftmaxCrossEntropyLoss Softplus
    Softsign SpaceToDepth Split SplitToSequence Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unique
    Unsqueeze Upsample Where Xor
"""
_MACHINE_LEARNING = """
    ArrayFeatureExtractor Binarizer FeatureVectorizer Imputer LabelEncoder LinearClassifier LinearRegressor Normalizer OneHotEncoder
    SVMClassifier SVMRegressor Scaler TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor
"""

OPERATORS = {"": frozenset(_STANDARD.split()), "ai.onnx.ml": frozenset(_MACHINE_LEARNING.split())}
"""Holds the names of the permitted operators, a dictionary keyed by ONNX domain; the domain ``ai.onnx`` has the empty text as its key."""

RANDOM = frozenset(("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"))
"""Lists the names of the operators that draw random numbers; the refusal of such an operator says that it is random."""


def refused_operator(graphs: Sequence[onnx.GraphProto]) -> tuple[str, str] | None:
    """Finds the first operator in a list of ONNX graphs that a probe must not use.

    Returns:
        A description of the operator and of its permitted replacement, or ``None`` if every operator is permitted.
    """
    for node in (node for graph in graphs for node in graph.node):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain not in OPERATORS:
            return f"operator {node.op_type!r} of domain {node.domain!r}", "standard ONNX operators only"
        if node.op_type in RANDOM:
            return f"random operator {node.op_type!r}", "operators whose result does not change"
        if node.op_type not in OPERATORS[domain]:
            return f"operator {node.op_type!r}", "operators of numbers that are certain to give the same result each time"
        if _trains(node, graphs):
            return (
                f"operator {node.op_type!r} in training mode",
                "training_mode false, as a constant: in training it depends on chance or on the batch",
            )
    return None


def _trains(node: onnx.NodeProto, graphs: Sequence[onnx.GraphProto]) -> bool:
    """Returns whether an operator (``Dropout`` or ``BatchNormalization``) may run in its training mode."""
    if node.op_type == "Dropout":
        return len(node.input) > 2 and node.input[2] != "" and not _is_false(node.input[2], graphs)
    if node.op_type == "BatchNormalization":
        return any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute) or any(node.output[1:])
    return False


def _is_false(name: str, graphs: Sequence[onnx.GraphProto]) -> bool:
    """Returns whether every value of a given name, in a probe's ONNX graph and the graphs inside it, is a constant and false."""
    values = list(_values(name, graphs))
    return bool(values) and all(value is not None and not onnx.numpy_helper.to_array(value).any() for value in values)


def _values(name: str, graphs: Sequence[onnx.GraphProto]) -> Iterator[onnx.TensorProto | None]:
    """Yields each value of a given name in a list of ONNX graphs as a tensor; ``None`` stands for a value that is not a constant."""
    for graph in graphs:
        yield from (tensor for tensor in graph.initializer if tensor.name == name)
        yield from (None for value in graph.input if value.name == name)
        for node in graph.node:
            if name in node.output:
                constant = node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].HasField("t")
                yield node.attribute[0].t if constant else None
