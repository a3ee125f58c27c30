"""Mixed-precision quantization by the Hessian (HAWQ): sensitivities, bit allocation, evaluation."""
