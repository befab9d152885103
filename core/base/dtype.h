// Element types, and the only switch over them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/base/error.h"
#include "core/base/float_types.h"

namespace shoal {

enum class DType : uint8_t { kF64, kF32, kBF16, kF16, kI32, kI64, kI8, kU8, kI16 };

constexpr size_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kF64:
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
    case DType::kI16:
      return 2;
    case DType::kI8:
    case DType::kU8:
      return 1;
  }
  return 0;
}

constexpr const char* Name(DType dtype) {
  constexpr const char* kNames[] = {"f64", "f32", "bf16", "f16", "i32", "i64", "i8", "u8", "i16"};
  return kNames[static_cast<int>(dtype)];
}

constexpr bool IsFloat(DType dtype) { return dtype <= DType::kF16; }

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kF64;
};
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<BF16> {
  static constexpr DType value = DType::kBF16;
};
template <>
struct DTypeOf<F16> {
  static constexpr DType value = DType::kF16;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::kI32;
};
template <>
struct DTypeOf<int64_t> {
  static constexpr DType value = DType::kI64;
};
template <>
struct DTypeOf<int8_t> {
  static constexpr DType value = DType::kI8;
};
template <>
struct DTypeOf<uint8_t> {
  static constexpr DType value = DType::kU8;
};
template <>
struct DTypeOf<int16_t> {
  static constexpr DType value = DType::kI16;
};

// The type that sums of T are held in: at least f32, never narrower than T.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;
constexpr DType AccumulatorDType(DType dtype) {
  return dtype == DType::kF64 ? DType::kF64 : DType::kF32;
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>{}) with T for `dtype`; `op` names the caller in the error.
template <class F>
decltype(auto) VisitFloat(DType dtype, const char* op, F&& f) {
  switch (dtype) {
    case DType::kF64:
      return f(TypeTag<double>{});
    case DType::kF32:
      return f(TypeTag<float>{});
    case DType::kBF16:
      return f(TypeTag<BF16>{});
    default:
      SHOAL_FAIL(ErrorKind::kBug, op, "computes in f64, f32 or bf16, not {}", Name(dtype));
  }
}

template <class F>
decltype(auto) VisitAny(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF64:
      return f(TypeTag<double>{});
    case DType::kF32:
      return f(TypeTag<float>{});
    case DType::kBF16:
      return f(TypeTag<BF16>{});
    case DType::kF16:
      return f(TypeTag<F16>{});
    case DType::kI32:
      return f(TypeTag<int32_t>{});
    case DType::kI64:
      return f(TypeTag<int64_t>{});
    case DType::kI8:
      return f(TypeTag<int8_t>{});
    case DType::kI16:
      return f(TypeTag<int16_t>{});
    case DType::kU8:
      break;
  }
  return f(TypeTag<uint8_t>{});
}

}  // namespace shoal
