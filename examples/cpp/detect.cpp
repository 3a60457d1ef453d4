// Run any model of an export with --end-to-end in C++: SparseInst, SOLO, SOLOv2, YOLACT.
//
//   sparseinst export --config-file CONFIG --format openvino --output out --size 640 864 --batch 1 --input image
//       --end-to-end 100 MODEL.WEIGHTS model_final.pth
//   build/detect out/model_openvino/model.xml photo.ppm 0.4
//
// The image is a binary PPM (P6, 8 bits, RGB) of the network's size; `convert photo.jpg -resize 864x640! photo.ppm`
// makes one. One line is printed for each detection: score, class, x0, y0, x1, y1, pixels of the mask.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

struct Image {
    size_t height = 0, width = 0;
    std::vector<uint8_t> pixels;  // (height, width, 3), RGB
};

Image read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    Image image;
    int largest = 0;
    file >> magic >> image.width >> image.height >> largest;
    file.get();
    if (!file || magic != "P6" || largest != 255)
        throw std::runtime_error(path + " is not a binary PPM of 8 bits without comments");
    image.pixels.resize(3 * image.height * image.width);
    file.read(reinterpret_cast<char*>(image.pixels.data()), static_cast<std::streamsize>(image.pixels.size()));
    if (!file) throw std::runtime_error(path + " is cut off");
    return image;
}

int main(int argc, char** argv) try {
    if (argc != 4 && argc != 5) {
        std::cerr << "usage: detect MODEL.xml IMAGE.ppm LOWEST_SCORE [bgr]\n";
        return 2;
    }
    const Image image = read_ppm(argv[2]);
    const float lowest = std::stof(argv[3]);
    // Channel order of the model: "channel_order" in the file's metadata.
    const bool is_bgr = argc == 5 && std::string(argv[4]) == "bgr";

    ov::Core core;
    auto model = core.read_model(argv[1]);
    const ov::PartialShape shape = model->input().get_partial_shape();
    if (model->input().get_element_type() != ov::element::u8)
        throw std::runtime_error("expected a model that was exported with --input image");
    const ov::Shape wanted = {1, 3, image.height, image.width};
    if (!shape.compatible(ov::PartialShape(wanted)))
        throw std::runtime_error("the image is " + std::to_string(image.height) + "x" + std::to_string(image.width) +
                                 ", the model takes " + shape.to_string());
    // OpenVINO's default is bfloat16 on processors that have it.
    auto compiled = core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32));
    auto request = compiled.create_infer_request();

    ov::Tensor input(ov::element::u8, wanted);
    const size_t num_pixels = image.height * image.width;
    for (size_t channel = 0; channel < 3; ++channel)
        for (size_t pixel = 0; pixel < num_pixels; ++pixel)
            input.data<uint8_t>()[channel * num_pixels + pixel] =
                image.pixels[3 * pixel + (is_bgr ? 2 - channel : channel)];
    request.set_input_tensor(input);
    request.infer();

    const ov::Tensor scores = request.get_tensor("scores"), classes = request.get_tensor("classes"),
                     boxes = request.get_tensor("boxes"), masks = request.get_tensor("masks");
    for (size_t index = 0; index < scores.get_shape()[1]; ++index) {
        const float score = scores.data<float>()[index];
        if (score <= 0 || score < lowest) continue;
        size_t area = 0;
        for (size_t pixel = 0; pixel < num_pixels; ++pixel) area += masks.data<uint8_t>()[index * num_pixels + pixel];
        const float* box = boxes.data<float>() + 4 * index;
        std::printf("%.6f %lld %.0f %.0f %.0f %.0f %zu\n", score,
                    static_cast<long long>(classes.data<int64_t>()[index]), box[0], box[1], box[2], box[3], area);
    }
    return 0;
} catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
}
