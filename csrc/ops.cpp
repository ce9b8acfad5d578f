// SPDX-License-Identifier: MIT
// Every operator of dmfast: the table of contents. What each does, and the shapes of its tensors,
// stands in dmfast/ops.py.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dmfast, m) {
  m.def("siamese_augment(Tensor x, Tensor params, Tensor? offsets=None) -> Tensor");
  m.def("_siamese_augment_backward(Tensor gradient, Tensor params, Tensor? offsets) -> Tensor");
  m.def(
      "gather_augment(Tensor images, Tensor index, Tensor params, Tensor mean, Tensor std, "
      "ScalarType dtype, Tensor? offsets=None) -> Tensor");

  m.def(
      "class_mean_discrepancy(Tensor real, Tensor syn, int classes, Tensor? real_offsets=None, "
      "Tensor? syn_offsets=None) -> (Tensor, Tensor)");
  m.def("_class_mean(Tensor rows, int classes, Tensor? offsets) -> Tensor");
  m.def(
      "_class_mean_backward(Tensor gradient, SymInt rows, Tensor? offsets, ScalarType dtype) -> "
      "Tensor");

  m.def(
      "instance_norm_relu_pool(Tensor x, Tensor? weight, Tensor? bias, float eps) -> "
      "(Tensor, Tensor)");
  m.def(
      "_instance_norm_relu_pool_backward(Tensor gradient, Tensor x, Tensor? weight, Tensor? bias, "
      "Tensor statistics, float eps, bool[] wanted) -> (Tensor, Tensor, Tensor)");

  // weight and bias [filters], or [networks, filters] where conv_weight has a leading axis of
  // networks; z is kept for the backward, if it is to be and is worth keeping.
  m.def(
      "conv_norm_relu_pool(Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, float eps, "
      "int padding, bool bfloat16, bool keep) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_conv_norm_relu_pool_backward(Tensor gradient, Tensor x, Tensor conv_weight, "
      "Tensor? weight, Tensor? bias, Tensor z, Tensor statistics, int padding, bool bfloat16, "
      "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  // By statistics [2, filters], mean and variance, of all images: those given, or the images' own.
  m.def(
      "conv_batch_norm_relu_pool(Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, "
      "Tensor? statistics, float eps, int padding, bool bfloat16, bool keep) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "_conv_batch_norm_relu_pool_backward(Tensor gradient, Tensor x, Tensor conv_weight, "
      "Tensor? weight, Tensor? bias, Tensor z, Tensor statistics, bool is_given, float eps, "
      "int padding, bool bfloat16, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_conv_batch_statistics(Tensor x, Tensor conv_weight, int padding, bool bfloat16) -> Tensor");
  // On a GPU; x is bfloat16, the parameters float32, packed what the third makes of conv_weight.
  m.def(
      "_fused_block(Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, Tensor? packed, "
      "float eps, int padding, bool wgmma) -> (Tensor, Tensor)");
  m.def(
      "_fused_block_backward(Tensor gradient, Tensor x, Tensor conv_weight, Tensor? weight, "
      "Tensor? bias, Tensor statistics, int padding, bool[] wanted) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("_fused_block_pack(Tensor conv_weight, int height, int width, int padding) -> Tensor");
  m.def(
      "_fused_block_takes(int channels, int filters, int height, int width, int padding, "
      "bool backward, int device) -> bool");
  m.def(
      "convnet_class_mean(Tensor images, Tensor index, Tensor offsets, Tensor params, Tensor mean, "
      "Tensor std, Tensor[] weights, int padding, float eps, bool bfloat16) -> Tensor");
  m.def("_cpu_kernels() -> str");
  m.def("_multiply_adds(int rounds, bool bfloat16) -> int");
  m.def("_cuda_architectures() -> str");

  // A step is a number, or a tensor on the device that is read when the operator runs.
  m.def(
      "draw_augmentation_(Tensor(a!) params, int[] words, bool all, int groups, int rows, "
      "int height, int width, float[] strength, int seed, int step, Tensor? step_tensor, "
      "int first_group, int stream) -> ()");
  m.def(
      "draw_batch(Tensor order, Tensor class_offsets, Tensor offsets, int rows, int seed, "
      "int step, Tensor? step_tensor, int first_class, int stream) -> Tensor");
  m.def(
      "draw_weights_(Tensor(a!)[] tensors, float[] bounds, int seed, int step, "
      "Tensor? step_tensor, int? networks, int first_network, int stream) -> ()");
}

// An empty module: importing it runs the registrations of the library.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
