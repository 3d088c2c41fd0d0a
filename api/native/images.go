package native

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"

	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// Images manages what sandboxes start from.
type Images interface {
	// Images lists what is in the store; `host` is always there and not listed.
	Images(ctx context.Context) ([]image.Image, error)
	GetImage(ctx context.Context, ref string) (image.Image, error)
	// PullImage fetches from a registry, or makes the template `base`. report,
	// which may be nil, is called one call after another.
	PullImage(ctx context.Context, req PullRequest, report func(image.Progress)) (image.Image, error)
	// ImportImage reads a tar archive, of docker save, an OCI layout, or a root; or
	// a disk image, raw or qcow2.
	ImportImage(ctx context.Context, name string, archive io.Reader) (image.Image, error)
	// ExportImage writes a tar archive that docker load and OCI tools read.
	ExportImage(ctx context.Context, ref string, w io.Writer) error
	// PushImage uploads an image to a registry under req.Ref.
	PushImage(ctx context.Context, ref string, req PullRequest, report func(image.Progress)) error
	// BuildImage carries out a Dockerfile. report, which may be nil, is given the
	// steps and what their commands print.
	BuildImage(ctx context.Context, req BuildImageRequest, report func(node.LogLine)) (image.Image, error)
	TagImage(ctx context.Context, ref, name string) (image.Image, error)
	RemoveImage(ctx context.Context, ref string) error
}

// PullRequest names an image of a registry, to pull from or push to. Without a user name, what
// docker login left on the node is used.
type PullRequest struct {
	Ref      string `json:"ref"`
	Username string `json:"username,omitempty"`
	Password string `json:"password,omitempty"`
	Platform string `json:"platform,omitempty"` // "linux/arm64"; default: the node's
	Insecure bool   `json:"insecure,omitempty"` // plain HTTP
}

// PushRequest says what to push, and where to.
type PushRequest struct {
	Source string      `json:"source"` // an image of this node
	Target PullRequest `json:"target"`
}

// TagRequest gives an image another name.
type TagRequest struct {
	Ref  string `json:"ref"`
	Name string `json:"name"`
}

// Images implements Backend.
func (l *Local) Images(context.Context) ([]image.Image, error) { return l.node.Images().List() }

// GetImage implements Backend.
func (l *Local) GetImage(_ context.Context, ref string) (image.Image, error) {
	return l.node.Images().Get(ref)
}

// PullImage implements Backend.
func (l *Local) PullImage(ctx context.Context, req PullRequest, report func(image.Progress)) (image.Image, error) {
	if req.Ref == image.BaseName {
		if _, err := l.node.EnsureBase(ctx, report); err != nil {
			return image.Image{}, err
		}
		return l.node.Images().Get(req.Ref)
	}
	return l.node.Images().Pull(ctx, req.Ref, req.registry(report))
}

func (r PullRequest) registry(report func(image.Progress)) image.RegistryOptions {
	return image.RegistryOptions{Username: r.Username, Password: r.Password, Platform: r.Platform, Insecure: r.Insecure, Progress: report}
}

// ImportImage implements Backend.
func (l *Local) ImportImage(ctx context.Context, name string, archive io.Reader) (image.Image, error) {
	return l.node.Images().Import(ctx, archive, image.ImportOptions{Name: name})
}

// ExportImage implements Backend.
func (l *Local) ExportImage(ctx context.Context, ref string, w io.Writer) error {
	return l.node.Images().Export(ctx, ref, w)
}

// PushImage implements Backend.
func (l *Local) PushImage(ctx context.Context, ref string, req PullRequest, report func(image.Progress)) error {
	return l.node.Images().Push(ctx, ref, req.Ref, req.registry(report))
}

// TagImage implements Backend.
func (l *Local) TagImage(_ context.Context, ref, name string) (image.Image, error) {
	return l.node.Images().Tag(ref, name)
}

// RemoveImage implements Backend.
func (l *Local) RemoveImage(_ context.Context, ref string) error { return l.node.Images().Remove(ref) }

// Images implements Backend.
func (c *Client) Images(ctx context.Context) ([]image.Image, error) {
	return ask[[]image.Image](ctx, c, "native.Images", http.MethodGet, "/images", nil, nil)
}

// GetImage implements Backend.
func (c *Client) GetImage(ctx context.Context, ref string) (image.Image, error) {
	return ask[image.Image](ctx, c, "native.GetImage", http.MethodGet, "/image", queryOf("ref", ref), nil)
}

// PullImage implements Backend.
func (c *Client) PullImage(ctx context.Context, req PullRequest, report func(image.Progress)) (image.Image, error) {
	return follow[image.Progress, image.Image](ctx, c, "native.PullImage", "/images/pull", nil, req, report)
}

// ImportImage implements Backend.
func (c *Client) ImportImage(ctx context.Context, name string, archive io.Reader) (image.Image, error) {
	return ask[image.Image](ctx, c, "native.ImportImage", http.MethodPost, "/images/import", queryOf("name", name), archive)
}

// ExportImage implements Backend.
func (c *Client) ExportImage(ctx context.Context, ref string, w io.Writer) error {
	return c.download(ctx, "native.ExportImage", "/images/export", queryOf("ref", ref), w)
}

// PushImage implements Backend.
func (c *Client) PushImage(ctx context.Context, ref string, req PullRequest, report func(image.Progress)) error {
	_, err := follow[image.Progress, none](ctx, c, "native.PushImage", "/images/push", nil, PushRequest{Source: ref, Target: req}, report)
	return err
}

// TagImage implements Backend.
func (c *Client) TagImage(ctx context.Context, ref, name string) (image.Image, error) {
	return ask[image.Image](ctx, c, "native.TagImage", http.MethodPost, "/images/tag", nil, TagRequest{Ref: ref, Name: name})
}

// RemoveImage implements Backend.
func (c *Client) RemoveImage(ctx context.Context, ref string) error {
	return c.tell(ctx, "native.RemoveImage", http.MethodDelete, "/image", url.Values{"ref": {ref}}, nil)
}

// Images are the node's, shared by all teams but for those of templates' builds:
// anybody may add one by pulling, since its content is its name's; only the root
// key may say what a name means.

func (s scoped) Images(ctx context.Context) ([]image.Image, error) {
	templates, err := s.Templates(ctx, s.team)
	if err != nil {
		return nil, err
	}
	all, err := s.Backend.Images(ctx)
	mine := all[:0]
	for _, img := range all {
		if img, ok := node.ImageFor(img, templates); ok {
			mine = append(mine, img)
		}
	}
	return mine, err
}

func (s scoped) GetImage(ctx context.Context, ref string) (image.Image, error) {
	templates, err := s.Templates(ctx, s.team)
	if err != nil {
		return image.Image{}, err
	}
	img, err := s.Backend.GetImage(ctx, ref)
	if err != nil {
		return image.Image{}, err
	}
	img, ok := node.ImageFor(img, templates)
	if !ok {
		return image.Image{}, sandbox.Errorf("native.GetImage", sandbox.NotFound, ref, "no such image")
	}
	return img, nil
}

// mayStart checks that what sandboxes or builds are to start from, a template or
// an image, is not another team's. What is not on this node is nobody's yet.
func (s scoped) mayStart(ctx context.Context, ref string) error {
	if ref == "" {
		return nil
	}
	_, err := s.Backend.GetTemplate(ctx, ref)
	if err == nil {
		_, err = s.GetTemplate(ctx, ref)
		return err
	}
	if !sandbox.Is(err, sandbox.NotFound) {
		return err
	}
	if _, err = s.Backend.GetImage(ctx, ref); err == nil {
		_, err = s.GetImage(ctx, ref)
		return err
	}
	if sandbox.Is(err, sandbox.NotFound) {
		return nil
	}
	return err
}

func (s scoped) ExportImage(ctx context.Context, ref string, w io.Writer) error {
	img, err := s.GetImage(ctx, ref)
	if err != nil {
		return err
	}
	return s.Backend.ExportImage(ctx, img.ID, w)
}

func (s scoped) ImportImage(context.Context, string, io.Reader) (image.Image, error) {
	return image.Image{}, s.denied("importing images")
}

func (s scoped) TagImage(context.Context, string, string) (image.Image, error) {
	return image.Image{}, s.denied("naming images")
}

func (s scoped) BuildImage(context.Context, BuildImageRequest, func(node.LogLine)) (image.Image, error) {
	return image.Image{}, s.denied("building images by hand; a template is yours to build")
}

func (s scoped) PushImage(context.Context, string, PullRequest, func(image.Progress)) error {
	return s.denied("pushing images with the node's credentials")
}

func (s scoped) RemoveImage(context.Context, string) error { return s.denied("removing images") }

// imageRoutes carry references in the query, since they hold slashes.
func imageRoutes() []route {
	const op = "native.Images"
	importing := on("POST", "/api/v1/images/import", "Make an image from a tar archive", func(c *call, _ none) (image.Image, error) {
		return c.backend.ImportImage(c.ctx, c.r.URL.Query().Get("name"), c.r.Body)
	}, "name")
	importing.accepts = "application/x-tar"
	return []route{
		on("GET", "/api/v1/images", "List images", func(c *call, _ none) ([]image.Image, error) { return c.backend.Images(c.ctx) }),
		on("GET", "/api/v1/image", "One image", func(c *call, _ none) (image.Image, error) {
			return c.backend.GetImage(c.ctx, c.r.URL.Query().Get("ref"))
		}, "ref"),
		onStream("POST", "/api/v1/images/pull", "Fetch an image from a registry", func(c *call, in PullRequest, report func(image.Progress)) (image.Image, error) {
			if in.Ref == "" {
				return image.Image{}, sandbox.E(op, sandbox.Invalid, "", errors.New("ref is missing"))
			}
			return c.backend.PullImage(c.ctx, in, report)
		}),
		importing,
		{method: "GET", path: "/api/v1/images/export", summary: "An image as a tar archive", returns: "application/x-tar", query: []string{"ref"},
			serve: func(c *call) error {
				return c.stream("application/x-tar", func(w http.ResponseWriter) error {
					return c.backend.ExportImage(c.ctx, c.r.URL.Query().Get("ref"), w)
				})
			}},
		onStream("POST", "/api/v1/images/push", "Upload an image to a registry", func(c *call, in PushRequest, report func(image.Progress)) (none, error) {
			return none{}, c.backend.PushImage(c.ctx, in.Source, in.Target, report)
		}),
		buildRoute(),
		on("POST", "/api/v1/images/tag", "Give an image another name", func(c *call, in TagRequest) (image.Image, error) {
			return c.backend.TagImage(c.ctx, in.Ref, in.Name)
		}),
		on("DELETE", "/api/v1/image", "Take a name of an image away", func(c *call, _ none) (none, error) {
			return none{}, c.backend.RemoveImage(c.ctx, c.r.URL.Query().Get("ref"))
		}, "ref"),
	}
}
