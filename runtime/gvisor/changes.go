package gvisor

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"gvisor.dev/gvisor/pkg/sentry/control"
	"gvisor.dev/gvisor/pkg/urpc"
	"gvisor.dev/gvisor/runsc/boot"

	"github.com/atoll-run/atoll/sandbox"
)

// Changes writes the overlay of the sandbox's root as an OCI layer.
func (r *Runtime) Changes(ctx context.Context, id string, w io.Writer) error {
	const op = "gvisor.Changes"
	b, err := r.box(op, id)
	if err != nil {
		return err
	}
	b.op.Lock()
	defer b.op.Unlock()
	s, err := b.live(op, sandbox.Running, sandbox.Paused)
	if err != nil {
		return err
	}
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
		err := call(ctx, s.dir, boot.FsTarRootfsUpperLayer, &control.TarRootfsUpperLayerOpts{
			ContainerID: containerID,
			FilePayload: urpc.FilePayload{Files: []*os.File{pw}},
		}, nil)
		pw.Close()
		done <- err
	}()
	err = filterLayer(w, pr)
	pr.Close() // a sentry that still writes fails
	return errors.Join(err, <-done)
}

// filterLayer copies a tar stream without what we put into the sandbox ourselves.
func filterLayer(w io.Writer, r io.Reader) error {
	in, out := tar.NewReader(r), tar.NewWriter(w)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return out.Close()
		}
		if err != nil {
			return fmt.Errorf("read the sentry's layer: %w", err)
		}
		if ours(h.Name) {
			continue
		}
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(out, in); err != nil {
			return err
		}
	}
}
