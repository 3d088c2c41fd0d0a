package fake

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/atoll-run/atoll/runtime/layer"
	"github.com/atoll-run/atoll/sandbox"
)

// Send implements sandbox.Runtime: all files are sent while the sandbox stands still, and the snapshot is not looked at.
func (r *Runtime) Send(ctx context.Context, id, _ string, w io.Writer) (stopped time.Time, err error) {
	if err := r.can("Send", r.caps.Live); err != nil {
		return stopped, err
	}
	err = r.with(ctx, "Send", id, func(op string, b *box) error {
		if err := b.want(op, sandbox.Running); err != nil {
			return err
		}
		stopped = time.Now()
		if err := b.freeze(op, sandbox.Paused); err != nil {
			return err
		}
		if err := layer.Write(ctx, w, b.home(), layer.Options{}); err != nil {
			return errors.Join(sandbox.E(op, sandbox.KindOf(err), id, err), b.freeze(op, sandbox.Running))
		}
		return nil
	})
	return stopped, err
}

// Receive implements sandbox.Runtime. Files come along, processes do not.
func (r *Runtime) Receive(ctx context.Context, spec sandbox.Spec, dir string, in io.ReadCloser, start func(run func() error) error) error {
	defer in.Close()
	if err := r.can("Receive", r.caps.Live); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, manifestName)); err != nil {
		return sandbox.Errorf(r.op("Receive"), sandbox.Invalid, spec.ID, "%s holds no snapshot: %w", dir, err)
	}
	arrived, err := os.MkdirTemp("", "arrived")
	if err != nil {
		return sandbox.E(r.op("Receive"), sandbox.Internal, spec.ID, err)
	}
	defer os.RemoveAll(arrived)
	if err := take(arrived, in); err != nil {
		return sandbox.E(r.op("Receive"), sandbox.KindOf(err), spec.ID, err)
	}
	made := false
	err = start(func() error {
		err := r.make(ctx, "Receive", spec, arrived)
		made = err == nil
		return err
	})
	if err != nil && made {
		err = errors.Join(err, r.Destroy(context.WithoutCancel(ctx), spec.ID))
	}
	return err
}

// take makes a snapshot in dir of files that arrive.
func take(dir string, in io.Reader) error {
	f, err := os.Create(filepath.Join(dir, filesName))
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(f, sum), in); err != nil {
		return err
	}
	text, err := json.Marshal(manifest{SHA256: hex.EncodeToString(sum.Sum(nil))})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, manifestName), text, 0o600)
}
