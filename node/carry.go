package node

import (
	"encoding/json"
	"maps"

	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

// Portable says why a snapshot cannot be used on another node; nil when it can.
func Portable(m snapshot.Manifest) error {
	const op = "node.Portable"
	switch {
	case m.Spec.Root.Kind == sandbox.RootDisk:
		return sandbox.Errorf(op, sandbox.Unsupported, m.ID, "its root is a disk image, and these do not leave their node").
			WithHint("import the image on the other node too, and make the sandbox there")
	case m.Spec.Root.Kind != sandbox.RootEROFS:
		return sandbox.Errorf(op, sandbox.Unsupported, m.ID, "its root is this host's own (%s), which other nodes do not have", m.Spec.Root.Kind).
			WithHint("make the sandbox from a template or an image")
	case len(m.Spec.Mounts) > 0:
		return sandbox.Errorf(op, sandbox.Unsupported, m.ID, "it has directories of this host mounted").
			WithHint("make the sandbox without volumes and mounts")
	}
	return nil
}

// Holds returns files that the runtimes have besides snapshots, and the roots of sandboxes that are here, whose images may be
// gone, by digest ("blake3:" and hexadecimal digits).
func (n *Node) Holds() map[string]string {
	out := make(map[string]string)
	for _, rec := range n.records(func(r Sandbox) bool {
		return live(r.State) && r.Spec.Root.Kind == sandbox.RootEROFS && r.Spec.Root.Digest != ""
	}) {
		out[rec.Spec.Root.Digest] = rec.Spec.Root.Path
	}
	for _, r := range n.runtimes {
		if h, ok := r.(interface{ Holds() map[string]string }); ok {
			maps.Copy(out, h.Holds())
		}
	}
	return out
}

// Localize makes a snapshot that came from another node one of this: its root is here.
func Localize(m snapshot.Manifest, root sandbox.Root) (snapshot.Manifest, error) {
	const op = "node.Localize"
	s, err := fromManifest(m)
	if err != nil {
		return m, err
	}
	if err := Portable(m); err != nil {
		return m, err
	}
	if s.Source.Spec.Root.Digest != m.Spec.Root.Digest || root.Digest != m.Spec.Root.Digest {
		return m, sandbox.Errorf(op, sandbox.Invalid, m.ID, "its parts are about different roots")
	}
	m.Spec.Root, m.Spec.Link = root, nil
	s.Source.Spec.Root, s.Source.Spec.Link = root, nil
	if m.Meta, err = json.Marshal(s); err != nil {
		return m, sandbox.E(op, sandbox.Internal, m.ID, err)
	}
	return m, nil
}
