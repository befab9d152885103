#include "memory/compress_activations.h"

#include "kernels/quantize.h"

namespace shoal {
namespace {

struct Packed {
  std::any values, scales;  // `scales` of int8
  Dims shape;
  DType dtype;
  Placement placement;
};

Dims Rows(const Dims& shape) { return {shape.numel() / shape[-1], shape[-1]}; }

}  // namespace

ActivationFormat ParseActivationFormat(std::string_view name) {
  if (name == "none") return ActivationFormat::kOwn;
  if (name == "bf16") return ActivationFormat::kBF16;
  if (name == "int8") return ActivationFormat::kInt8;
  SHOAL_FAIL(ErrorKind::kConfig, "memory",
             "memory.compress_activations \"{}\" is none of none, bf16, int8", name);
}

SavedTensorHooks CompressActivations(ActivationFormat format, SavedTensorHooks inner) {
  if (!inner.pack) {
    inner.pack = [](const Tensor& t) -> std::any { return t; };
    inner.unpack = [](const std::any& packed) { return std::any_cast<const Tensor&>(packed); };
  }
  SHOAL_CHECK(format != ActivationFormat::kOwn, "compress", "into nothing else");
  SavedTensorHooks hooks;
  hooks.rounds = true;
  hooks.pack = [format, inner](const Tensor& t) -> std::any {
    Packed packed = {{}, {}, t.shape(), t.dtype(), t.placement()};
    if (format == ActivationFormat::kBF16 || t.numel() == 0) {
      packed.values = inner.pack(t.dtype() == DType::kBF16 ? t : t.To(DType::kBF16));
      return packed;
    }
    const Dims rows = Rows(t.shape());
    const Tensor codes = Tensor::Empty(rows, DType::kI8);
    const Tensor scales = Tensor::Empty({rows[0], kernels::QuantizeBlocks(rows[1])}, DType::kF32);
    kernels::Quantize(ExecutionContext::Current().stream(), codes.view(), scales.view(),
                      (t.contiguous() ? t : t.Clone()).Reshaped(rows).view());
    packed.values = inner.pack(codes);
    packed.scales = inner.pack(scales);
    return packed;
  };
  hooks.unpack = [inner](const std::any& any) {
    const auto& packed = std::any_cast<const Packed&>(any);
    Tensor values = inner.unpack(packed.values);
    if (packed.scales.has_value()) {
      const Dims rows = Rows(packed.shape);
      const Tensor codes = std::exchange(values, Tensor::Empty(rows, packed.dtype));
      kernels::Dequantize(ExecutionContext::Current().stream(), values.view(), codes.view(),
                          inner.unpack(packed.scales).view());
      values = values.Reshaped(packed.shape);
    } else if (values.dtype() != packed.dtype) {
      values = values.To(packed.dtype);
    }
    values.set_placement(packed.placement);
    return values;
  };
  return PackOnce(std::move(hooks));
}

}  // namespace shoal
