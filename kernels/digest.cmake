# Writes ${OUT}, a C function that returns one digest of all sources of the library (dispatch.py compares it).
file(GLOB_RECURSE files ${CMAKE_CURRENT_LIST_DIR}/*.cpp ${CMAKE_CURRENT_LIST_DIR}/*.h)
foreach(each ${files})
  file(SHA256 ${each} digest)
  list(APPEND digests ${digest})
endforeach()
list(SORT digests)
string(SHA256 digest "${digests}")
file(WRITE ${OUT} "extern \"C\" __attribute__((visibility(\"default\"))) const char* lk_sources() { return \"${digest}\"; }\n")
