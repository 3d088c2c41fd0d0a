// Package snapshot keeps the saved states of sandboxes: where their files are,
// what they are made of, whose children they are and when they may go.
//
// A snapshot is one directory. It becomes visible by a rename, after all of it
// is on disk, and disappears by a rename before any of it is removed; so after
// a crash there is either the whole of it or nothing.
package snapshot

import (
	"encoding/json"
	"time"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/sandbox"
)

// Manifest describes one snapshot. It lies beside the state as manifest.json.
type Manifest struct {
	Format  int       `json:"format"` // of this structure: formatVersion
	ID      string    `json:"id"`
	Parent  string    `json:"parent,omitempty"` // the snapshot from which the sandbox itself came
	Sandbox string    `json:"sandbox"`
	Runtime string    `json:"runtime"`
	Memory  bool      `json:"memory"` // processes and memory are in it, not only files
	Created time.Time `json:"created"`
	// Spec is what the sandbox was made from. A restore needs the same root.
	Spec  sandbox.Spec `json:"spec"`
	Files []File       `json:"files"` // sorted by name
	// Meta belongs to the caller (names, owners); the store only keeps it.
	Meta json.RawMessage `json:"meta,omitempty"`
}

// Size is how many bytes the snapshot's files take.
func (m Manifest) Size() int64 {
	var n int64
	for _, f := range m.Files {
		n += f.Size
	}
	return n
}

// File is one file of a snapshot.
type File struct {
	Name   string `json:"name"` // relative, slash-separated
	Size   int64  `json:"size"`
	Digest string `json:"digest,omitempty"` // "blake3:hex"; empty for one that was not hashed
}

const formatVersion = 1

// Expired decides which snapshots may go under rules, whose lines are sandboxes. Pinned ones (in use by a paused sandbox, a template,
// or kept by name) never go. Files that several have in common are counted once. The result is oldest first. It looks at nothing
// but its arguments.
func Expired(all []Manifest, r chunk.Rules, now time.Time, pinned func(Manifest) bool) []Manifest {
	kept := make([]chunk.Kept, len(all))
	for i, m := range all {
		k := chunk.Kept{Name: m.ID, Line: m.Sandbox, Pinned: pinned(m), Created: m.Created}
		for _, f := range m.Files {
			id := f.Digest
			if id == "" {
				id = m.ID + "/" + f.Name
			}
			k.Holds = append(k.Holds, chunk.Content{ID: chunk.Sum([]byte(id)), Size: f.Size})
		}
		kept[i] = k
	}
	var out []Manifest
	for _, i := range chunk.Expired(kept, r, now) {
		out = append(out, all[i])
	}
	return out
}

// Lineage returns the chain of snapshots from id up to its root, nearest first.
// A parent that is gone ends it, as does a loop, which only a damaged manifest
// can make.
func Lineage(all []Manifest, id string) []Manifest {
	byID := make(map[string]Manifest, len(all))
	for _, m := range all {
		byID[m.ID] = m
	}
	var chain []Manifest
	for seen := map[string]bool{}; id != "" && !seen[id]; {
		seen[id] = true
		m, ok := byID[id]
		if !ok {
			break
		}
		chain = append(chain, m)
		id = m.Parent
	}
	return chain
}
