package image

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// importLayout imports from an OCI layout.
func (s *Store) importLayout(ctx context.Context, b bundle, opts ImportOptions) (Image, error) {
	var index v1.IndexManifest
	if err := readDocument(b, "index.json", &index); err != nil {
		return Image{}, err
	}
	platform := opts.Platform
	if platform == "" {
		platform = HostPlatform()
	}
	manifest, name, err := findManifest(b, index, platform, 0)
	if err != nil {
		return Image{}, err
	}
	if opts.Name != "" {
		name = opts.Name
	}
	var config v1.ConfigFile
	if err := readBlob(b, manifest.Config.Digest, &config); err != nil {
		return Image{}, err
	}
	if len(config.RootFS.DiffIDs) != len(manifest.Layers) {
		return Image{}, fmt.Errorf("the image has %d layers, its configuration %d", len(manifest.Layers), len(config.RootFS.DiffIDs))
	}
	var layers, names []string
	for _, l := range manifest.Layers {
		layers = append(layers, blobName(l.Digest))
	}
	if name != "" {
		names = []string{name}
	}
	return s.importLayers(ctx, b, layers, &config, "imported OCI layout", opts.Name != "", names)
}

// refNames are the annotations by which layouts name their images.
var refNames = []string{"io.containerd.image.name", "org.opencontainers.image.ref.name"}

// findManifest follows nested indexes, few levels deep, to the image for a
// platform, and returns the name that is written next to it.
func findManifest(b bundle, index v1.IndexManifest, platform string, depth int) (*v1.Manifest, string, error) {
	if depth > 3 {
		return nil, "", errors.New("indexes are nested too deeply")
	}
	d, err := choosePlatform(index, platform)
	if err != nil {
		return nil, "", err
	}
	name := ""
	for _, key := range refNames {
		if name == "" {
			name = d.Annotations[key]
		}
	}
	if d.MediaType.IsIndex() {
		var inner v1.IndexManifest
		if err := readBlob(b, d.Digest, &inner); err != nil {
			return nil, "", err
		}
		m, innerName, err := findManifest(b, inner, platform, depth+1)
		if name == "" {
			name = innerName
		}
		return m, name, err
	}
	var m v1.Manifest
	if err := readBlob(b, d.Digest, &m); err != nil {
		return nil, "", err
	}
	return &m, name, nil
}

func blobName(h v1.Hash) string { return path.Join("blobs", h.Algorithm, h.Hex) }

// readBlob decodes a JSON document named by its hash, and verifies that.
func readBlob(b bundle, want v1.Hash, into any) error {
	r, err := b.open(blobName(want))
	if err != nil {
		return err
	}
	defer r.Close()
	hash := sha256.New()
	if err := decodeDocument(io.TeeReader(r, hash), want.String(), into); err != nil {
		return err
	}
	if got := fmt.Sprintf("%x", hash.Sum(nil)); want.Algorithm != "sha256" || got != want.Hex {
		return fmt.Errorf("document %s is corrupt", want)
	}
	return nil
}
