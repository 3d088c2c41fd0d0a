package gvisor

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"strings"

	"gvisor.dev/gvisor/pkg/urpc"

	"github.com/atoll-run/atoll/runtime/gvisor/orders"
	"github.com/atoll-run/atoll/sandbox"
)

// Changes writes the overlay of the sandbox's root as an OCI layer.
func (r *Runtime) Changes(ctx context.Context, id string, w io.Writer) error {
	const op = "gvisor.Changes"
	b, s, err := r.boxes.Hold(op, id, sandbox.Running, sandbox.Paused)
	if err != nil {
		return err
	}
	defer b.Unlock()
	if err := s.changes(ctx, w); err != nil {
		return sandbox.E(op, "", id, err)
	}
	return nil
}

func (s *sentry) changes(ctx context.Context, w io.Writer) error {
	pr, pw, err := os.Pipe()
	if err != nil {
		return err
	}
	defer pr.Close()
	done := make(chan error, 1)
	go func() {
		err := call(ctx, s.dir, orders.CallChanges, &orders.Changes{
			ContainerID: orders.ContainerID,
			FilePayload: urpc.FilePayload{Files: []*os.File{pw}},
		}, nil)
		pw.Close()
		done <- err
	}()
	err = filterLayer(w, pr)
	pr.Close() // a sentry that still writes fails
	return errors.Join(err, <-done)
}

// gVisor writes a removed file as overlayfs stores it: a device with number 0/0;
// and a replaced directory with this attribute. OCI has files of these names instead.
const (
	opaqueRecord   = "SCHILY.xattr.trusted.overlay.opaque"
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// filterLayer copies a tar stream in the form of an OCI layer, without what we
// put into the sandbox ourselves.
func filterLayer(w io.Writer, r io.Reader) error {
	in, out := tar.NewReader(r), tar.NewWriter(w)
	// gVisor's overlay links all whiteouts of a file system to one, so that those after the first come as hard links to it.
	whiteouts := map[string]bool{} // names as the sentry gives them
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return out.Close()
		}
		if err != nil {
			return fmt.Errorf("read the sentry's layer: %w", err)
		}
		if h.Typeflag == tar.TypeLink && whiteouts[h.Linkname] {
			h.Typeflag, h.Linkname = tar.TypeChar, ""
		}
		if isWhiteout(h) {
			whiteouts[h.Name] = true
		}
		for _, h := range layerEntries(h) {
			if err := out.WriteHeader(h); err != nil {
				return err
			}
			if h.Typeflag == tar.TypeReg && h.Size > 0 {
				if _, err := io.Copy(out, in); err != nil {
					return err
				}
			}
		}
	}
}

// layerEntries translates one entry: to none when it is ours, to two when it is
// a directory that hides the one below it.
func layerEntries(h *tar.Header) []*tar.Header {
	name := relative(h.Name)
	if ours(name) {
		return nil
	}
	out := *h
	out.Name = name
	switch h.Typeflag {
	case tar.TypeLink:
		out.Linkname = relative(h.Linkname)
	case tar.TypeChar:
		if isWhiteout(h) {
			dir, base := path.Split(name)
			return []*tar.Header{{Typeflag: tar.TypeReg, Name: dir + whiteoutPrefix + base, ModTime: h.ModTime}}
		}
	case tar.TypeDir:
		out.Name += "/"
		if h.PAXRecords[opaqueRecord] != "" {
			out.PAXRecords = maps.Clone(h.PAXRecords)
			delete(out.PAXRecords, opaqueRecord)
			return []*tar.Header{&out, {Typeflag: tar.TypeReg, Name: out.Name + opaqueName, ModTime: h.ModTime}}
		}
	}
	return []*tar.Header{&out}
}

// isWhiteout reports whether an entry is how overlayfs stores a removed file.
func isWhiteout(h *tar.Header) bool {
	return h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0
}

// relative makes the clean relative name that layers have of a tar name.
func relative(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }
