package image

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// buildResult is what a step led to: a root with layers still to be applied. It
// is kept under the step's key.
type buildResult struct {
	Root   string   `json:"root"`             // digest
	Layers []string `json:"layers,omitempty"` // digests of plain tar files, lowest first
}

// stopTime is how long a machine may take to end.
const stopTime = 30 * time.Second

// hostFiles are written anew by every sandbox and belong in no image.
var hostFiles = []string{"etc/hosts", "etc/hostname", "etc/resolv.conf"}

// command carries out OpRun.
func (b *build) command(ctx context.Context, st *state, step Step) (cached bool, err error) {
	st.key = hashOf(st.key, jsonText(st.args))
	if b.recall(st) {
		return true, nil
	}
	if err := b.startMachine(ctx, st); err != nil {
		return false, err
	}
	c := Command{Args: st.argv(step), Env: slices.Clone(st.config.Env), User: st.config.User, Dir: st.dir("."), Output: b.req.Output}
	if step.User != "" {
		c.User = step.User
	}
	for _, arg := range st.args {
		key, value := cutEnv(arg)
		if _, ok := getEnv(c.Env, key); !ok {
			c.Env = setEnv(c.Env, key, value)
		}
	}
	exit, err := b.machine.Run(ctx, c)
	if err != nil {
		return false, err
	}
	if exit != 0 {
		return false, &StepError{Step: step, Exit: exit}
	}
	next := *st
	next.root = b.rootOf
	digest, size, err := b.saveLayer(&next, nil, func(w io.Writer) error { return b.machine.Changes(ctx, w) })
	if err != nil {
		return false, err
	}
	st.root, st.layers = b.rootOf, []string{digest}
	if size > rebaseBytes {
		return false, b.stopMachine(ctx)
	}
	b.machineOn = *st
	return false, nil
}

func cutEnv(line string) (key, value string) {
	for i := range len(line) {
		if line[i] == '=' {
			return line[:i], line[i+1:]
		}
	}
	return line, ""
}

// startMachine makes sure that a machine runs on the files of st.
func (b *build) startMachine(ctx context.Context, st *state) error {
	if b.machine != nil && b.machineOn.sameFiles(st) {
		return nil
	}
	if err := b.stopMachine(ctx); err != nil {
		return err
	}
	if b.req.Start == nil {
		return sandbox.Errorf("build", sandbox.Unsupported, "", "there is no sandbox to run commands in")
	}
	image := Image{Config: st.config, Platform: st.platform}
	err := b.materialize(ctx, st, func(root sandbox.Root, size int64) error {
		image.Root, image.Size = root, size
		return nil
	})
	if err != nil {
		return err
	}
	image.setID()
	if b.machine, err = b.req.Start(ctx, image); err != nil {
		b.machine = nil
		return err
	}
	b.machineOn, b.rootOf = *st, image.Root
	return nil
}

func (b *build) stopMachine(ctx context.Context) error {
	if b.machine == nil {
		return nil
	}
	m := b.machine
	b.machine = nil
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
	defer cancel()
	return m.Close(ctx)
}

// materialize turns a state into one root, and calls record as convert does.
func (b *build) materialize(ctx context.Context, st *state, record func(sandbox.Root, int64) error) error {
	key := hashOf("root", st.root.Digest, jsonText(st.layers))
	ready := st.root
	if len(st.layers) > 0 {
		r, ok := b.store.readResult(key)
		if !ok {
			files, err := b.openLayers(st)
			if err != nil {
				return err
			}
			defer closeAll(files)
			return b.store.convert(ctx, conversion{base: &st.root, layers: files, ignore: hostFiles}, func(root sandbox.Root, size int64) error {
				if err := b.store.writeResult(key, buildResult{Root: root.Digest}); err != nil {
					return err
				}
				return record(root, size)
			})
		}
		ready = sandbox.Root{Kind: sandbox.RootEROFS, Path: b.store.rootPath(r.Root), Digest: r.Root}
	}
	unlock, err := b.store.lockShared()
	if err != nil {
		return err
	}
	defer unlock()
	info, err := os.Stat(ready.Path)
	if err != nil {
		return err
	}
	return record(ready, info.Size())
}

func (b *build) openLayers(st *state) ([]*os.File, error) {
	var files []*os.File
	for _, digest := range st.layers {
		f, err := os.Open(b.store.path("blobs", blobFile(digest)))
		if err != nil {
			closeAll(files)
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// tree returns the files of a state; the caller closes them.
func (b *build) tree(ctx context.Context, st *state) (t *tree, closer func(), err error) {
	u, err := newUnpacker(b.store.path("tmp"), b.store.opts.Limits, b.store.opts.Xattrs)
	if err != nil {
		return nil, nil, err
	}
	files, err := b.openLayers(st)
	if err != nil {
		return nil, nil, errors.Join(err, u.Close())
	}
	closer = func() {
		closeAll(files)
		_ = u.Close()
	}
	root, err := os.Open(st.root.Path)
	if err != nil {
		closer()
		return nil, nil, err
	}
	files = append(files, root)
	info, err := root.Stat()
	if err == nil {
		err = u.addEROFS(root, info.Size())
	}
	for _, f := range files[:len(files)-1] {
		if err == nil {
			err = u.addFile(ctx, f)
		}
	}
	if err != nil {
		closer()
		return nil, nil, err
	}
	return u.tree, closer, nil
}

// recall finds the result of the step that st.key names and puts its files into
// st.
func (b *build) recall(st *state) bool {
	if st.noCache {
		return false
	}
	r, ok := b.store.readResult(st.key)
	if !ok {
		return false
	}
	st.root = sandbox.Root{Kind: sandbox.RootEROFS, Path: b.store.rootPath(r.Root), Digest: r.Root}
	st.layers = r.Layers
	return true
}

// readResult returns a step's result if it is still there, all of it.
func (s *Store) readResult(key string) (buildResult, bool) {
	var r buildResult
	text, err := os.ReadFile(s.path("builds", key+".json"))
	if err != nil || json.Unmarshal(text, &r) != nil {
		return r, false
	}
	if s.VerifyRoot(sandbox.Root{Kind: sandbox.RootEROFS, Digest: r.Root}) != nil {
		return r, false
	}
	for _, l := range r.Layers {
		if _, err := os.Stat(s.path("blobs", blobFile(l))); err != nil {
			return r, false
		}
	}
	return r, true
}

// writeResult keeps a step's result. The caller holds the lock.
func (s *Store) writeResult(key string, r buildResult) error {
	return s.writeFile(s.path("builds", key+".json"), []byte(jsonText(r)))
}

// saveLayer keeps what write writes as a layer on top of below, and the result
// of the step that st.key names. It returns the layer's digest and size in bytes.
func (b *build) saveLayer(st *state, below []string, write func(io.Writer) error) (digest string, size int64, err error) {
	f, err := b.store.temp()
	if err != nil {
		return "", 0, err
	}
	defer f.discard()
	hash := sha256.New()
	if err := write(io.MultiWriter(f, hash)); err != nil {
		return "", 0, err
	}
	if size, err = f.Seek(0, io.SeekCurrent); err != nil {
		return "", 0, err
	}
	digest = fmt.Sprintf("sha256:%x", hash.Sum(nil))
	unlock, err := b.store.lockShared()
	if err != nil {
		return "", 0, err
	}
	defer unlock()
	final := b.store.path("blobs", blobFile(digest))
	if _, err := os.Stat(final); errors.Is(err, fs.ErrNotExist) {
		if err := f.publish(final); err != nil {
			return "", 0, err
		}
	}
	layers := append(slices.Clone(below), digest)
	return digest, size, b.store.writeResult(st.key, buildResult{Root: st.root.Digest, Layers: layers})
}
