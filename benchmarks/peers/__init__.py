"""The test cases of other libraries, written anew, through curvlab and through plain autograd."""
