package image

// buildResult is what a build step led to: a root with layers still to be
// applied on top. It is kept under the step's key.
type buildResult struct {
	Root   string   `json:"root"`             // digest
	Layers []string `json:"layers,omitempty"` // digests of plain tar files, lowest first
	Config Config   `json:"config"`
}
