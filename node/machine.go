package node

import (
	"bytes"
	"context"
	"io"
	"strings"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/sandbox"
)

// BuildImage carries out a build whose commands run in sandboxes of this node.
// Where the request does not say how to find the image of a FROM, a template
// beats an image of the store, which beats a registry's.
func (n *Node) BuildImage(ctx context.Context, req image.BuildRequest) (image.Image, error) {
	if req.Base == nil {
		req.Base = func(ctx context.Context, ref string) (image.Image, error) {
			img, err := n.templateImage(ctx, ref)
			if sandbox.Is(err, sandbox.NotFound) {
				return n.pulled(ctx, ref, image.RegistryOptions{})
			}
			return img, err
		}
	}
	req.Start = n.startMachine
	return n.cfg.Images.Build(ctx, req)
}

// templateImage is the image of a template's finished build.
func (n *Node) templateImage(ctx context.Context, ref string) (image.Image, error) {
	t, err := n.GetTemplate(ctx, ref)
	if sandbox.Is(err, sandbox.NotFound) && ref == BaseTemplate {
		t, err = n.EnsureBase(ctx, nil)
	}
	if err != nil {
		return image.Image{}, err
	}
	b, err := t.pick(ref)
	if err != nil {
		return image.Image{}, err
	}
	return n.cfg.Images.Get(b.Image)
}

// pulled returns an image of the store, from its registry if it is not there.
func (n *Node) pulled(ctx context.Context, ref string, o image.RegistryOptions) (image.Image, error) {
	img, err := n.cfg.Images.Get(ref)
	if sandbox.Is(err, sandbox.NotFound) {
		return n.cfg.Images.Pull(ctx, ref, o)
	}
	return img, err
}

// machine is a sandbox in which a build runs its commands.
type machine struct {
	node *Node
	id   string
}

var _ image.Machine = (*machine)(nil)

// startMachine starts a sandbox on an image for a build.
func (n *Node) startMachine(ctx context.Context, img image.Image) (image.Machine, error) {
	sb, err := n.createInternal(ctx, CreateRequest{Image: img.ID}, origin{root: img.Root})
	if err != nil {
		return nil, err
	}
	return &machine{node: n, id: sb.ID}, nil
}

// createInternal is Create, always from the image, for a sandbox that the node needs for itself. It is
// never listed, has no name that a user could want, and does not outlive this
// process.
func (n *Node) createInternal(ctx context.Context, req CreateRequest, from origin) (Sandbox, error) {
	rec, err := n.draft(req, from)
	if err != nil {
		return Sandbox{}, err
	}
	rec.Internal = true
	if rec.Runtime, err = n.choose("node.build", req, rec, ""); err != nil {
		return Sandbox{}, err
	}
	return n.launch(ctx, rec, source{})
}

// Run implements image.Machine.
func (m *machine) Run(ctx context.Context, c image.Command) (int, error) {
	g, err := m.node.Guest(ctx, m.id)
	if err != nil {
		return 0, err
	}
	p, err := g.With(guest.Options{User: c.User}).Start(ctx, guest.Command{Args: c.Args, Env: envMap(c.Env), Dir: c.Dir})
	if err != nil {
		return 0, err
	}
	defer p.Close()
	result, err := p.Wait(c.Output, c.Output)
	return result.ShellCode(), err
}

// Changes implements image.Machine.
func (m *machine) Changes(ctx context.Context, w io.Writer) error {
	return m.node.Changes(ctx, m.id, w)
}

// Close implements image.Machine.
func (m *machine) Close(ctx context.Context) error {
	err := m.node.Remove(context.WithoutCancel(ctx), m.id)
	if sandbox.Is(err, sandbox.NotFound) {
		return nil
	}
	return err
}

// lineWriter calls add with each whole line that is written to it. A line
// without an end is cut at maxLine bytes.
type lineWriter struct {
	add  func(line string)
	rest []byte
}

const maxLine = 16 << 10

// Write implements io.Writer.
func (w *lineWriter) Write(data []byte) (int, error) {
	w.rest = append(w.rest, data...)
	for {
		i := bytes.IndexByte(w.rest, '\n')
		if i < 0 && len(w.rest) < maxLine {
			return len(data), nil
		}
		if i < 0 {
			i = maxLine - 1
		}
		w.add(strings.TrimRight(string(w.rest[:i+1]), "\r\n"))
		w.rest = w.rest[i+1:]
	}
}
