"""The top Hessian eigenvalue against PyHessian and curvlinops."""
