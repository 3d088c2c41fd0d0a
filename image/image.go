// Package image turns OCI images, archives, build steps and distributions'
// packages into read-only EROFS roots that sandboxes start from.
//
// A Store is a directory of such roots, named by the BLAKE3 hash of their
// bytes, with records of what each one is. Whatever the source, the path is
// the same: layers, lowest first, are applied to a tree in memory whose file
// contents stay where they are, and the tree is written as one EROFS file that
// depends on nothing but the tree. No archive is ever unpacked on the host.
package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// HostName is the image that is always there: the host's own system.
const HostName = "host"

// Image is a root and how to start something in it. It is a value.
type Image struct {
	ID       string       `json:"id"`              // "sha256:hex" of root, config and platform
	Names    []string     `json:"names,omitempty"` // e.g. "python:3.12", sorted; empty for one without a name
	Root     sandbox.Root `json:"root"`
	Config   Config       `json:"config"`
	Size     int64        `json:"size"`           // bytes of the root; 0 for host
	Disk     int64        `json:"disk,omitempty"` // bytes of the disk that a disk image is of; 0 for others
	Created  time.Time    `json:"created"`
	Platform string       `json:"platform"`         // e.g. "linux/amd64"
	Digest   string       `json:"digest,omitempty"` // of the manifest at the registry that it came from
	Layers   []Layer      `json:"layers,omitempty"` // as pulled, lowest first
	Source   string       `json:"source,omitempty"` // for people: where it came from
	Key      string       `json:"key,omitempty"`    // what it was made from, for recipes that compare it before they work anew
}

// Layer is one layer of an image as its registry has it.
type Layer struct {
	Digest string `json:"digest"` // of the compressed bytes
	Size   int64  `json:"size"`   // of the same
}

// Config is what an image says about the processes to be started in it.
type Config struct {
	Env          []string          `json:"env,omitempty"`  // KEY=value, in order
	User         string            `json:"user,omitempty"` // name or uid, with ":group" or not; empty means root
	WorkingDir   string            `json:"workingDir,omitempty"`
	Entrypoint   []string          `json:"entrypoint,omitempty"`
	Cmd          []string          `json:"cmd,omitempty"`
	ExposedPorts []string          `json:"exposedPorts,omitempty"` // "80/tcp", sorted
	Labels       map[string]string `json:"labels,omitempty"`
	Shell        []string          `json:"shell,omitempty"` // of RUN's shell form; nil means /bin/sh -c
}

// clone returns a copy that shares nothing with c.
func (c Config) clone() Config {
	c.Env = slices.Clone(c.Env)
	c.Entrypoint = slices.Clone(c.Entrypoint)
	c.Cmd = slices.Clone(c.Cmd)
	c.ExposedPorts = slices.Clone(c.ExposedPorts)
	c.Shell = slices.Clone(c.Shell)
	labels := make(map[string]string, len(c.Labels))
	for k, v := range c.Labels {
		labels[k] = v
	}
	c.Labels = labels
	return c
}

// setID names the image by what it runs as.
func (i *Image) setID() {
	text, err := json.Marshal(struct {
		Root     string
		Config   Config
		Platform string
	}{i.Root.Digest, i.Config, i.Platform})
	if err != nil {
		panic(err) // strings, slices and maps of strings always encode
	}
	sum := sha256.Sum256(text)
	i.ID = "sha256:" + hex.EncodeToString(sum[:])
}

// HostPlatform is the platform of this machine.
func HostPlatform() string { return "linux/" + runtime.GOARCH }

// host returns the image of the host itself.
func host() Image {
	i := Image{
		Names:    []string{HostName},
		Root:     sandbox.Root{Kind: sandbox.RootHost},
		Platform: HostPlatform(),
		Source:   "the host's own /usr",
	}
	i.setID()
	return i
}

// Familiar returns the spelling of an image's name under which the store keeps
// it: without Docker Hub's host and folder, with the tag "latest" when there
// is none.
func Familiar(name string) string {
	for _, prefix := range []string{"index.docker.io/", "docker.io/"} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			name = strings.TrimPrefix(rest, "library/")
			break
		}
	}
	last := name[strings.LastIndexByte(name, '/')+1:]
	if !strings.ContainsAny(last, ":@") && name != HostName {
		name += ":latest"
	}
	return name
}
